"""Names of formats, without their code: the command line needs them before anything heavy is imported."""

FIELDS = "fields"
"""The format whose rows are documents with a column a field; its sources have prompts of their own."""

CONVERSATIONS = ("messages", "qwen_json", "llava", "swift", "texts")
"""Formats whose rows are whole conversations; in evaluation, the last reply is the gold answer."""
