"""The lines that `finetune.terminal.say` would print, collected."""

from finetune.terminal import Say, labelled


def collect(lines: list[str]) -> Say:
    """A `say` that appends its lines to a list."""

    def say(label: str, text: object = "", /) -> None:
        lines.append(labelled(label, text))

    return say
