"""`finetune export`: a checkpoint in the forms that other programs read."""
