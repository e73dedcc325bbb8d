"""Text: vocabulary, tokenizer, conversations as ids, and the markup of boxes."""
