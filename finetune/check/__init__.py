"""`finetune check`: what a run would do, and all that is wrong with it."""
