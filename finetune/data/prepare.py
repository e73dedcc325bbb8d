"""Check a recipe's data and write it in the form that is fastest to read: `finetune prepare`.

    DIR/train/00000.parquet, ...   the samples that can be trained on, as conversations, their images' bytes inside
    DIR/eval/00000.parquet, ...    those to evaluate on, where the recipe has such
    DIR/prepared.json              what they were made from, and each file with its rows and SHA-256
    DIR/left_out.jsonl             what was left out, and why

Training on it is the same as training on the originals: the same conversations, in the same order, with the same
pixels. Sources whose weights are not all 1 get a folder each (`DIR/train/1`), as weights are drawn source by source.
So do several sources to evaluate on that are scored, by their names (`DIR/eval/boarding`).
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from hashlib import file_digest, sha256
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.checks.checked import Checked
from finetune.data.formats.names import CONVERSATIONS
from finetune.data.prepared_rows import JPEG_QUALITY, BadImages, try_row, write_shard
from finetune.data.reading import read_checked, views_of
from finetune.data.row_progress import RowProgress
from finetune.data.sample import BadRow, DataError
from finetune.data.samples import Samples
from finetune.data.summary import count_rows, describe_data, lines_left_out
from finetune.errors import UserError
from finetune.files.atomic_writes import clean_partials, make_folder, write_text
from finetune.files.disk_space import check_disk_space
from finetune.files.path_errors import path_errors
from finetune.quantities import format_bytes
from finetune.recipe import Recipe
from finetune.recipe.sources import source_names
from finetune.recipe.yaml_file import write_yaml
from finetune.run.folder import RunFolder
from finetune.run.identity import compare_runs
from finetune.terminal import Say, say
from qwenvl import QwenVLProcessor
from qwenvl.loading import find_source

MANIFEST = "prepared.json"
LEFT_OUT = "left_out.jsonl"
SHARD_ROWS = 500
"""Rows of one file, and so the most that an interrupted `prepare` repeats."""
_MEASURED = 64  # samples by which the disk space is estimated
_OWN_FILES = {MANIFEST, LEFT_OUT, "run.lock", "train", "eval"}


@dataclass(frozen=True)
class Group:
    """Samples that are written into one folder, and are one source of a recipe that uses them.

    Attributes:
        folder: below the prepared folder.
        indices: of the samples, in order.
        weight: of the source.
        name: under which its scores are logged; None where it needs none.
    """

    folder: str
    indices: Sequence[int]
    weight: float
    name: str | None = None

    def shards(self) -> list[tuple[str, Sequence[int]]]:
        """Name of each file below the prepared folder, and the samples in it."""
        starts = range(0, len(self.indices), SHARD_ROWS)
        return [
            (f"{self.folder}/{number:05}.parquet", self.indices[start : start + SHARD_ROWS])
            for number, start in enumerate(starts)
        ]


@dataclass
class Manifest:
    """What `prepared.json` holds.

    Attributes:
        made_from: settings and fingerprints; an interrupted call is continued only for the same.
        counts: of the check, for "train" and "eval".
        shards: file -> its `rows`, `bytes`, `sha256`, and `left_out`, origin and reason of each row with a bad image.
        complete: whether all files are written.
    """

    made_from: dict[str, Any]
    counts: dict[str, dict[str, int]]
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False

    def write(self, folder: Path) -> None:
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest of a folder; None where it has none.

        Raises:
            UserError: it is damaged.
        """
        file = folder / MANIFEST
        with _folder_errors(folder):
            if not file.exists():
                return None
            data = file.read_bytes()
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}): remove {folder} to prepare the data again") from error


def prepare(recipe: Recipe, to: Path, image_size: int | None = None, say: Say = say) -> Manifest:
    """Check a recipe's data and write what can be used of it, or continue an interrupted call.

    Args:
        recipe: whose `data` and `evaluate.data` are read.
        to: the folder to write.
        image_size: pixels; an image with a longer side is stored as a smaller copy. None stores the encoded bytes of
            every image as they are.
        say: prints a line.

    Raises:
        UserError: `to` holds something else, or cannot be written.
        RunLocked: another process is writing there.
        DataError, MissingFileError: the data cannot be used (see `read_checked`), or has images that cannot be read.
        NotEnoughDiskSpace: the disk has too little free space.
    """
    base = find_source(recipe.model.path).base
    processor = QwenVLProcessor.from_pretrained(base)
    seen, views = processor.image_processor.size["height"], views_of(recipe)
    if image_size is not None and image_size < seen:
        raise UserError(f"--image-size {image_size}: the model sees images at {seen} x {seen} pixels; give no less")
    if image_size is not None and views is not None and image_size < (least := ceil(seen * views.scale)):
        raise UserError(
            f"--image-size {image_size}: with data.views the model sees each part of an image at {seen} x {seen} "
            f"pixels, which are {least} for the whole side; give no less"
        )
    with _folder_errors(to):
        make_folder(to)
    with RunFolder(to).lock():
        parts = _read_data(recipe, processor, say)
        names = {"eval": names_to_keep(recipe)}
        groups = {name: _groups(name, *part, names.get(name)) for name, part in parts.items()}
        manifest = Manifest(
            _made_from(recipe, image_size, parts), {name: count_rows(checked) for name, (_, checked) in parts.items()}
        )
        _take_over(to, manifest, groups, say)
        if not manifest.complete:
            samples = {name: samples for name, (samples, _) in parts.items()}
            _write_all(to, manifest, groups, samples, image_size, skip_bad=recipe.data.on_bad_row == "skip")
            lines = [line for _, checked in parts.values() for line in lines_left_out(checked)]
            bad = [entry for shard in manifest.shards.values() for entry in shard["left_out"]]
            lines += [json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad]
            with _folder_errors(to):
                write_text(to / LEFT_OUT, "".join(lines))
                manifest.complete = True
                manifest.write(to)
    _say_result(to, manifest, groups, image_size, recipe, say)
    return manifest


def _folder_errors(to: Path) -> AbstractContextManager[None]:
    """Turn an OSError about the prepared folder into an error for the user."""
    return path_errors(
        to, "keep the prepared data in", "The files written so far stay: make room, or give another --to"
    )


def _read_data(recipe: Recipe, processor: QwenVLProcessor, say: Say) -> dict[str, tuple[Samples, Checked]]:
    # Each image is decoded when it is written.
    parts = read_checked(recipe, processor, opens_images=False)
    for name, (samples, checked) in parts.items():
        say(f"{name} data", describe_data(checked))
        for note in samples.notes:
            say("", note)
    evaluate = recipe.evaluate
    # Of conversations a task reads the answer, but of other formats also columns that conversations do not have.
    if evaluate is not None and evaluate.task and {source.format for source in evaluate.data} - set(CONVERSATIONS):
        say(
            "evaluate",
            f"its data stays where it is: task {evaluate.task} reads more of it than conversations hold (all answers, "
            "boxes in pixels)",
        )
        del parts["eval"]
    return parts


def names_to_keep(recipe: Recipe) -> list[str] | None:
    """The names under which the scores of several sources to evaluate on are logged; None where there are none."""
    evaluate = recipe.evaluate
    return source_names(evaluate.data) if evaluate is not None and evaluate.task and len(evaluate.data) > 1 else None


def _groups(name: str, samples: Samples, checked: Checked, names: Sequence[str] | None) -> list[Group]:
    """The samples by folder.

    Args:
        names: of the sources, which then have a folder each; None where they need none.
    """
    if names is None and all(weight == 1 for weight in checked.weights):
        return [Group(name, checked.kept.tolist(), 1.0)]
    groups = []
    for number, weight in enumerate(checked.weights):
        indices = checked.kept[checked.source == number].tolist()
        if not indices:
            # The draw of a weighted source depends on its number, which would change for those after this one.
            raise UserError(f"{name} data: no row of source {number + 1} can be used; leave it out of the recipe")
        if names is None:
            groups.append(Group(f"{name}/{number + 1}", indices, weight))
        else:
            groups.append(Group(f"{name}/{names[number]}", indices, weight, names[number]))
    return groups


def _made_from(recipe: Recipe, image_size: int | None, parts: Mapping[str, tuple[Samples, Checked]]) -> dict[str, Any]:
    data = recipe.data
    settings = ("max_length", "labels", "grounding", "on_long", "on_bad_row", "images_root", "allow_urls")
    set_only = ("ignore", "markup_as_text")  # earlier calls know neither
    sources = {"train": data.train, "eval": () if recipe.evaluate is None else recipe.evaluate.data}
    return {
        "image_size": image_size,
        "shard_rows": SHARD_ROWS,
        "data": {
            **{key: getattr(data, key) for key in settings},
            **{key: list(value) for key in set_only if (value := getattr(data, key))},
            **({} if data.train_on == "all" else {"train_on": data.train_on}),
            **({} if data.views is None else {"views": data.views.model_dump(mode="json")}),
        },
        "sources": {
            name: [{"path": source.path, "weight": source.weight} for source in sources[name]] for name in parts
        },
        **({"names": names} if (names := names_to_keep(recipe)) is not None and "eval" in parts else {}),
        "fingerprints": {name: samples.fingerprint(images=False) for name, (samples, _) in parts.items()},
        "images": {name: samples.fingerprint() for name, (samples, _) in parts.items()},
        # What is short enough depends on the tokenizer as well.
        "kept": {name: sha256(checked.kept.tobytes()).hexdigest() for name, (_, checked) in parts.items()},
    }


def _take_over(to: Path, manifest: Manifest, groups: Mapping[str, list[Group]], say: Say) -> None:
    """Enter the files of an earlier, interrupted call that are undamaged in the manifest.

    Raises:
        UserError: the folder holds something else.
    """
    with _folder_errors(to):
        clean_partials(to)
    stored = Manifest.read(to)
    if stored is None:
        with _folder_errors(to):
            others = sorted(path.name for path in to.iterdir() if path.name not in _OWN_FILES)
        if others:
            raise UserError(f"{to} is not prepared data and not empty ({', '.join(others[:5])}): give another folder")
        return
    # Before all files are written, images that were found to be bad may be replaced.
    ignored = () if stored.complete else ("images",)
    if differences := compare_runs(stored.made_from, manifest.made_from, ignored):
        raise UserError(
            f"{to} holds data prepared from something else:\n  "
            + "\n  ".join(differences)
            + "\nGive another folder, or remove that one"
        )
    wanted = [name for part in groups.values() for group in part for name, _ in group.shards()]
    for name in wanted:
        shard = stored.shards.get(name)
        if shard is not None and _digest(to / name) == shard["sha256"]:
            manifest.shards[name] = shard
        elif shard is not None:
            say("damaged", f"{name} is missing or damaged: it is written again")
    manifest.complete = stored.complete and len(manifest.shards) == len(wanted)
    if not manifest.complete and manifest.shards:
        say("continuing", f"{len(manifest.shards):,} of {len(wanted):,} files are there")


def _write_all(
    to: Path,
    manifest: Manifest,
    groups: Mapping[str, list[Group]],
    samples: Mapping[str, Samples],
    image_size: int | None,
    *,
    skip_bad: bool,
) -> None:
    """Write the files that are missing.

    Raises:
        DataError: images that cannot be read, of all files; or no row is left.
    """
    todo = [
        (part, name, indices)
        for part, ones in groups.items()
        for group in ones
        for name, indices in group.shards()
        if name not in manifest.shards
    ]
    with _folder_errors(to):
        manifest.write(to)
    total = sum(len(group.indices) for ones in groups.values() for group in ones)
    left = sum(len(indices) for _, _, indices in todo)
    problems: list[BadRow] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        check_disk_space(to, _room_needed(todo, samples, image_size, threads), "the prepared data")
        with RowProgress("preparing data", total, total - left) as progress:
            for part, name, indices in todo:
                try:
                    with _folder_errors(to):
                        make_folder((to / name).parent)
                        clean_partials((to / name).parent)
                        bad = write_shard(
                            to / name,
                            samples[part],
                            indices,
                            image_size=image_size,
                            skip_bad=skip_bad,
                            threads=threads,
                            add_done=progress.add,
                        )
                        manifest.shards[name] = {
                            "rows": len(indices) - len(bad),
                            "bytes": (to / name).stat().st_size,
                            "sha256": _digest(to / name),
                            "left_out": [{"origin": str(problem.origin), "reason": str(problem)} for problem in bad],
                        }
                        manifest.write(to)
                except BadImages as error:
                    problems += error.problems
    if problems:
        raise DataError(
            f"of {total:,} samples, {len(problems):,} have images that cannot be read (fix them, or leave them out "
            "with on_bad_row: skip; the files without them are kept):",
            problems,
        )
    for ones in groups.values():
        for group in ones:
            if not any(manifest.shards[name]["rows"] for name, _ in group.shards()):
                raise DataError(f"none of the images of {group.folder} can be read; {to / MANIFEST} lists the reasons")


def _room_needed(
    todo: Sequence[tuple[str, str, Sequence[int]]],
    samples: Mapping[str, Samples],
    image_size: int | None,
    threads: ThreadPoolExecutor,
) -> int:
    """Bytes of the files to write, estimated from samples spread over them."""
    places = [(part, index) for part, _, indices in todo for index in indices]
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, min(_MEASURED, len(places)), dtype=int)]
    rows = threads.map(lambda place: try_row(samples[place[0]][place[1]], image_size), chosen)
    sizes = [_size(row) for row in rows if not isinstance(row, BadRow)]
    return int(1.1 * len(places) * sum(sizes) / len(sizes)) if sizes else 0


def _size(row: Mapping[str, Any]) -> int:
    texts = sum(len(part.get("text") or "") for message in row["messages"] for part in message["content"])
    return texts + sum(len(image["bytes"]) for image in row["images"])


def _digest(file: Path) -> str | None:
    """SHA-256 of a file; None where there is none."""
    try:
        with file.open("rb") as opened:
            return file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _say_result(
    to: Path,
    manifest: Manifest,
    groups: Mapping[str, list[Group]],
    image_size: int | None,
    recipe: Recipe,
    say: Say,
) -> None:
    shards = manifest.shards.values()
    rows, size = sum(shard["rows"] for shard in shards), sum(shard["bytes"] for shard in shards)
    files = f"{len(shards):,} file{'' if len(shards) == 1 else 's'}"
    say("prepared", f"{to}: {rows:,} rows in {files}, {format_bytes(size)}")
    if bad := sum(len(shard["left_out"]) for shard in shards):
        say("left out", f"{bad:,} rows with images that cannot be read; {to / LEFT_OUT} lists them")
    if image_size is not None:
        say(
            "images",
            f"those with a side over {image_size} pixels are smaller copies (JPEG stays JPEG, at quality "
            f"{JPEG_QUALITY}; all others are PNG): training on them differs from training on the originals",
        )
    say("to use it", "put this into the recipe, in place of what is there:")
    for line in snippet(to, groups, recipe).splitlines():
        say("", line)


def snippet(to: Path, groups: Mapping[str, list[Group]], recipe: Recipe) -> str:
    """The part of a recipe, as YAML, that uses the prepared data; `recipe` is what it was prepared for."""
    used = {
        name: [
            {"path": str(to / group.folder), "format": "messages"}
            | ({} if group.weight == 1 else {"weight": group.weight})
            | ({} if group.name is None else {"name": group.name})
            for group in ones
        ]
        for name, ones in groups.items()
    }
    sections: dict[str, dict[str, Any]] = {"data": {"train": used["train"]}}
    if recipe.data.markup_as_text:
        # The rows hold it still. What is not read is not in them, so that data.ignore is not needed.
        sections["data"]["markup_as_text"] = list(recipe.data.markup_as_text)
    if "eval" in used:
        sections["evaluate"] = {"data": used["eval"]}
    if any(source.part is not None for source in recipe.data.train):
        # What was prepared is cut already, and what was not keeps its part.
        sections["data"]["split"] = None
        if recipe.evaluate is not None and "eval" not in used:
            kept = [source.model_dump(mode="json", exclude_defaults=True) for source in recipe.evaluate.data]
            sections["evaluate"] = {"data": kept}
    if recipe.data.train_on != "all":
        sections["data"]["train_on"] = recipe.data.train_on
    if recipe.data.views is not None:
        sections["data"]["views"] = recipe.data.views.model_dump(mode="json")
    return write_yaml(sections)
