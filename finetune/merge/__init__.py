"""`finetune merge`: an adapter into its base."""
