"""README.md of a finished checkpoint: what it is made of, how it was trained, its scores, how to load it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import UserError
from finetune.files.atomic_writes import write_text
from finetune.files.checkpoint_folder import CARD
from finetune.files.path_errors import path_errors
from finetune.quantities import format_loss
from finetune.report.logged_scores import is_score
from finetune.run.folder import RunFolder
from finetune.run.saved_step import saved_step

LICENSE_PATTERNS = ("LICENSE*", "LICENCE*", "Tongyi*LICENSE*")
TONGYI = "Tongyi Qianwen"

USE = """\
```python
from qwenvl import load_model, load_processor

folder = "path/to/this/folder"
model, processor = load_model(folder, device_map="auto"), load_processor(folder)
parts = [{"type": "image", "image": "image.jpg"}, {"type": "text", "text": "What is in the image?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": parts}],
    tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
).to(model.device)
reply = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(processor.tokenizer.decode(reply, skip_special_tokens=True))
```

With Transformers' own classes, after `import qwenvl` (no remote code):

```python
import qwenvl
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```

In a terminal: `finetune chat path/to/this/folder`.
"""

LIMITS = """\
For the kind of data it was trained on, by people who check what it says. It inherits the abilities and the faults of
its base, made-up details and misread text among them. Nothing beside the figures above was measured: other tasks,
languages and kinds of image, and safety, are for you to test before use."""


def write_card(
    folder: Path,
    *,
    title: str,
    base: str,
    fingerprint: str | None = None,
    facts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    training: Sequence[str] = (),
    tags: Sequence[str] = (),
    use: str = USE,
) -> None:
    """Write `README.md` into a checkpoint folder, with the metadata that the hub reads.

    Args:
        folder: complete except for the card; the license that is named is that of the license file in it.
        title: its heading.
        base: hub id or folder of the checkpoint that it was made from.
        fingerprint: of the base's weights (`qwenvl.checkpoint.fingerprint`).
        facts: how it was made, shown as a table.
        notes: sentences that a user must read: what differs from what was trained.
        training: lines about data, recipe and figures (see `training_sections`).
        tags: in addition to those of every checkpoint of this toolkit.
        use: how to load it, where that is not the usual way.
    """
    lines = [f"# {title}", "", f"Made from {_base_text(base)}{_fingerprint_text(fingerprint)}.", ""]
    lines += [f"> {note}\n" for note in notes]
    if facts:
        lines += ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts.items()), ""]
    lines += training
    lines += ["## Use", "", use, "## Intended use and limits", "", LIMITS, "", "## License", "", _license_text(folder)]
    header = yaml.safe_dump(_metadata(folder, base, tags), sort_keys=False, allow_unicode=True)
    write_text(folder / CARD, f"---\n{header}---\n\n" + "\n".join(lines) + "\n")


def training_sections(run: str | Path | None) -> list[str]:
    """What a run folder says of its data, figures and recipe, in Markdown; nothing without a run.

    Raises:
        UserError: one of its files is damaged.
    """
    if run is None:
        return []
    folder = RunFolder(run)
    lines = []
    with path_errors(run, "read", "Make it readable, or restore it"):
        facts = folder.read_run() or {}
        rows = facts.get("rows")
        metrics = folder.read_metrics()
        recipe = (
            folder.recipe_file.read_text(encoding="utf-8", errors="replace") if folder.recipe_file.is_file() else ""
        )
    if rows:
        lines += ["## Data", "", "| | rows | trained or scored | too long | bad |", "|---|---|---|---|---|"]
        try:
            for name, count in rows.items():
                numbers = (f"{count[key]:,}" for key in ("total", "kept", "too_long", "bad"))
                lines.append(f"| {name} | {' | '.join(numbers)} |")
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{folder.run_file}: its rows are not as a run writes them: restore the file") from error
        lines.append("")
    if table := _figures(metrics, saved_step(facts)):
        lines += ["## Figures", "", *table, ""]
    if recipe:
        fence = "```" if "```" not in recipe else "~~~~~~~~"
        lines += ["## Recipe", "", f"{fence}yaml", recipe.rstrip(), fence, ""]
    return lines


def is_hub_id(base: str) -> bool:
    """`owner/name`, and no folder that is here."""
    return base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()


def _metadata(folder: Path, base: str, tags: Sequence[str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if is_hub_id(base):  # the hub knows only its own names
        metadata["base_model"] = base
    metadata |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    metadata["tags"] = ["qwen-vl", "vision-language", "fine-tuned", *tags]
    license_file = _license_file(folder)
    if license_file is not None:
        metadata["license"] = "other"
        if TONGYI in license_file.read_text(encoding="utf-8", errors="replace"):
            metadata["license_name"] = "tongyi-qianwen"
        metadata["license_link"] = license_file.name
    return metadata


def _license_file(folder: Path) -> Path | None:
    return next((file for pattern in LICENSE_PATTERNS for file in sorted(folder.glob(pattern))), None)


def _license_text(folder: Path) -> str:
    license_file = _license_file(folder)
    if license_file is None:
        return "The base came without a license file; its terms hold for this model too: look them up at its source."
    return f"That of the base: see [{license_file.name}]({license_file.name.replace(' ', '%20')})."


def _base_text(base: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else f"`{base}`"


def _fingerprint_text(fingerprint: str | None) -> str:
    return f" (weights' fingerprint `{fingerprint}`)" if fingerprint else ""


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _figures(metrics: Sequence[dict[str, Any]], saved: int | None) -> list[str]:
    """First value of the training loss and of every score of the evaluations, and that of the step that is saved; None
    for the last."""
    first: dict[str, tuple[int, float]] = {}
    last: dict[str, tuple[int, float]] = {}
    for record in metrics:
        for key, value in record.items():
            if (key == "loss" or is_score(key)) and isinstance(value, int | float):
                step = record.get("step", 0)
                first.setdefault(key, (step, value))
                if saved is None or step <= saved:
                    last[key] = (step, value)
    if not last:
        return []
    rows = [
        f"| {key} | {format_loss(first[key][1])} (step {first[key][0]}) | {format_loss(value)} (step {step}) |"
        for key, (step, value) in last.items()
    ]
    heading = "last" if saved is None else f"of these weights, step {saved}"
    return [f"| | first | {heading} |", "|---|---|---|", *rows]
