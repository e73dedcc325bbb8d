"""Fine-tuning of Qwen-VL: recipes, data, training, evaluation, merging and export."""
