"""`finetune RECIPE`: the training run from recipe to report."""
