"""The prompt that a user's words are put into, and how a model is asked, in words: for chat and for serving."""

from finetune.errors import UserError
from finetune.replies.task_replies import Style
from qwenvl.checkpoint.record import ModelRecord

PLACEHOLDERS = ("{question}", "{phrase}")
"""What stands for the user's words in the prompts of recipes."""


def in_prompt(question: str, prompt: str | None) -> str:
    """The question in place of the placeholder of a prompt template; as it is without one."""
    for placeholder in PLACEHOLDERS:
        if prompt is not None and placeholder in prompt:
            return prompt.replace(placeholder, question)
    return question


def choose_template(prompt: str | None, record: ModelRecord, name: str) -> str | None:
    """The template of `--prompt`.

    Args:
        prompt: as given: a template, "trained", "plain"; None is that of training where there is exactly one that has
            a placeholder, else none.
        record: of the model.
        name: of the model, for the message.

    Raises:
        UserError: a text without a placeholder, or "trained" where there is not one prompt of training.
    """
    trained = record.only_prompt
    if prompt is None:
        return trained if trained is not None and in_prompt("", trained) != "" else None
    if prompt == "plain":
        return None
    if prompt == "trained" and trained is None:
        several = ", ".join(map(repr, record.templates))
        known = f"it was trained on several: {several}" if several else "its record has none"
        raise UserError(f"--prompt trained: {name} has no single prompt that it was trained with: {known}")
    template = trained if prompt == "trained" else prompt
    if template is None or not any(placeholder in template for placeholder in PLACEHOLDERS):
        raise UserError(
            f"--prompt: there is no {' or '.join(PLACEHOLDERS)} in {template!r} to put a message in place of. Give "
            "trained, plain, or a text with one"
        )
    return template


def asking_notes(
    record: ModelRecord, style: Style, *, prompt: str | None, template: str | None, system: str | None
) -> list[str]:
    """What a user should know of how messages are asked, a line each.

    Args:
        record, style: of the model.
        prompt: as given with `--prompt`; None without it.
        template: what `choose_template` made of it.
        system: as given with `--system`; None without it.
    """
    notes = []
    if template is not None:
        by = "as it was trained; --prompt plain asks as typed" if prompt in (None, "trained") else "--prompt"
        notes.append(f"each message is put into the prompt {template!r} ({by})")
    elif prompt is None and record.only_prompt is None and (templates := record.templates):
        others = "" if all(record.prompts.values()) else " and on rows with prompts of their own"
        notes.append(
            f"messages are asked as typed: it was trained with {' and '.join(map(repr, templates))}{others}; --prompt "
            "TEXT puts them into one of these"
        )
    if style == "chat" and system is None and record.system is not None:
        notes.append(f"after the system message {record.system!r} (as it was trained; --system TEXT gives another)")
    if record.views is not None:
        notes.append(f"each image is shown as {record.views} (as it was trained)")
    return notes
