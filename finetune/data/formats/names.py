"""Names of formats, without their code: the command line needs them before anything heavy is imported."""

CONVERSATIONS = ("messages", "qwen_json", "llava", "swift", "texts")
"""Formats whose rows are whole conversations; in evaluation, the last reply is the gold answer."""
