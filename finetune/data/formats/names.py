"""The formats by name, apart from their code: the command line needs them before anything heavy is imported."""

CONVERSATIONS = ("messages", "qwen_json", "llava")
"""Formats whose rows bring what is asked; the gold answer is the last reply."""
