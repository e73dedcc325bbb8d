"""Questions, replies and scores: `finetune evaluate`, and the score while a model trains."""
