"""The model's replies to a few evaluation rows before and after training, for the run's report."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from finetune.batches.collate import Collator
from finetune.data.message_parts import image_sources
from finetune.errors import UserError
from finetune.files.atomic_writes import write_text
from finetune.replies.lockstep import lockstep_of
from finetune.replies.replies import Decoding, Prompt, generate_replies, plan_replies, stop_ids_of
from finetune.report.images import jpeg_settings
from qwenvl import ImageAccess, load_image
from qwenvl.text.chat import render_chat

PREDICTIONS = "predictions.jsonl"
IMAGE_FOLDER = "predictions"
THUMBNAIL = 640  # pixels of the longer side; enough to read a receipt in the report


def split_last_reply(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str] | None:
    """The conversation before its last reply, and that reply; None where it does not end with one."""
    if messages[-1]["role"] != "assistant":
        return None
    answer = messages[-1]["content"]
    if not isinstance(answer, str):
        answer = "".join(part["text"] for part in answer if part["type"] == "text")
    return list(messages[:-1]), answer


def write_predictions(
    model: torch.nn.Module,
    collator: Collator,
    rows: Sequence[int],
    accelerator: Accelerator,
    *,
    run: Path,
    when: str,
    max_new_tokens: int,
) -> None:
    """Generate greedy replies to samples and add them to the run's predictions; on all processes together.

    Args:
        model: not wrapped by DDP; its mode is left as it is. It may be sharded over the processes.
        collator: has the samples.
        rows: indices of samples, the same on all processes; each replies to a share of them.
        accelerator: of the trainer; its main process writes.
        run: the run folder; images are written into it as small JPEGs, named by their content.
        when: "before" or "after" training; earlier records of the same time are replaced.
        max_new_tokens: most tokens of a reply.

    Raises:
        UserError: an image cannot be read, and such rows are not skipped.
    """
    asked, prompts = [], []
    for row in rows:
        sample = collator.samples[row]
        parts = split_last_reply(collator.rules.fit(sample.messages).messages)
        if parts is None:
            continue
        rendered = render_chat(
            parts[0],
            collator.tokenizer,
            add_generation_prompt=True,
            grounding=collator.rules.grounding,
            views=collator.rules.views,
            n_queries=collator.rules.n_queries,
        )
        asked.append((sample, *parts))
        prompts.append(Prompt(rendered.ids, rendered.images, sample.access, str(sample.origin)))
    own = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    share = [prompts[number] for number in own]
    with lockstep_of(model, collator.tokenizer.pad_token_id) as lockstep:
        made = [
            dataclasses.replace(reply, index=own[reply.index])
            for reply in generate_replies(
                model,
                share,
                plan_replies(share),
                collator.tokenizer,
                collator.image_processor,
                Decoding(max_new_tokens, stop_ids_of(model, collator.tokenizer)),
                on_bad_image="wrong",
                vision_cache=collator.vision_cache,
                lockstep=lockstep,
            )
        ]
    if accelerator.num_processes > 1:
        made = gather_object(made)
    # After the gathering, so that all processes raise together and none waits for another.
    bad = [reply.unreadable for reply in made if reply.unreadable is not None]
    if bad and collator.rules.on_bad_row == "error":
        raise UserError(bad[0])
    if not accelerator.is_main_process:
        return
    # A row that is left out because its image cannot be read has no reply to show.
    replies = {reply.index: reply.text for reply in made if reply.unreadable is None}
    records = [
        {
            "when": when,
            "origin": str(sample.origin),
            "question": _last_question(question),
            # As a whole each: boxes are of these, and not of their parts.
            "images": keep_images(list(image_sources(question)), sample.access, str(sample.origin), run),
            "target": target,
            "prediction": replies[index],
        }
        for index, (sample, question, target) in enumerate(asked)
        if index in replies
    ]
    replace_records(run / PREDICTIONS, when, records)


def _last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text").strip()


def keep_images(sources: Sequence[Any], access: ImageAccess, name: str, run: Path) -> list[str]:
    """Write small copies of images into the run folder.

    Returns:
        Their paths relative to that folder.

    Raises:
        ImageError: an image cannot be read.
    """
    return [_keep_image(load_image(source, access=access, name=name), run) for source in sources]


def _keep_image(image: Image.Image, run: Path) -> str:
    folder = run / IMAGE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(image.tobytes()).hexdigest()[:16] + ".jpg"
    if not (folder / name).exists():
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(folder / name, "JPEG", **jpeg_settings(small, 88))
    return f"{IMAGE_FOLDER}/{name}"


def replace_records(file: Path, when: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records to a predictions file, in place of its earlier records of the same time.

    Raises:
        UserError: a line of the file is damaged.
    """
    kept = []
    if file.is_file():
        # At \n only: strings may hold other line separators.
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            try:
                if line and json.loads(line)["when"] != when:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{file}, line {number}: is damaged; delete the line") from None
    lines = kept + [json.dumps(record, ensure_ascii=False) for record in records]
    write_text(file, "".join(line + "\n" for line in lines))
