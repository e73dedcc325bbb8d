"""Replies in batches, for evaluation, chat and rewards alike."""
