"""`finetune chat`: a conversation in the terminal."""
