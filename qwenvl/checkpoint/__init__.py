"""Checkpoint files: the tensors in them, how they are read, and the fingerprint of their weights."""
