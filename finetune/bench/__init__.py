"""`finetune bench`: memory and time of a recipe on this device."""
