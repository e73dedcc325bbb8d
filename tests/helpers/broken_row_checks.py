"""Whether broken rows are accepted or reported as they must be, and what is trained of those that are accepted."""

import os
from collections import Counter
from pathlib import Path

from broken_rows import BOXES, LOOK_ALIKES, SEEN, SETTINGS, broken_lines
from files_of_pages import encrypted_pdf, frames, pdf
from PIL import Image

from finetune.data.checks.checked import Checked
from finetune.data.checks.checking import look_at
from finetune.data.checks.image_check import open_images, without
from finetune.data.checks.markup import check_markup_names, markup_kind
from finetune.data.checks.rules import Rules
from finetune.data.message_parts import image_sources
from finetune.data.sample import BadRow
from finetune.data.samples import Samples
from finetune.recipe.sources import Source
from qwenvl import QwenVLTokenizer
from qwenvl.images.page_references import find_page


def write_images(folder: Path) -> None:
    """The images that the rows name, and what else their paths may lead to."""
    for name in ("a.png", "b.jpg", "hash#1.png", "100%.png"):
        Image.new("RGB", (60, 50), "teal").save(folder / name)
    Image.new("RGB", (60, 50), "red").save(folder.parent / "outside.png")
    (folder / "sub").mkdir()
    (folder / "empty.png").touch()
    (folder / "link_outside.png").symlink_to(folder.parent / "outside.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "fifo")
    (folder / "pages.pdf").write_bytes(pdf())
    for ending, kind in (("tif", "TIFF"), ("gif", "GIF"), ("webp", "WEBP")):
        (folder / f"pages.{ending}").write_bytes(frames(kind))
    (folder / "locked.pdf").write_bytes(encrypted_pdf())
    (folder / "cut.pdf").write_bytes(pdf()[:60])
    # A page of the one, or the other.
    for name in ("both.pdf", "both.pdf#1"):
        (folder / name).write_bytes(pdf())
    # The file of that name alone.
    Image.new("RGB", (60, 50), "teal").save(folder / "both.tif#1", "TIFF")


def check_broken_rows(
    folder: Path, row_format: str, count: int, seed: int, tokenizer: QwenVLTokenizer
) -> Counter[tuple[str, str]]:
    """Rows by kind and fate (accepted, reported, too_long), each with exactly one.

    Of odd seeds, coordinates at the edge are clamped, `fields` are asked for as JSON, and look-alikes are text: then
    they must be counted.

    Raises:
        AssertionError: a row is lost, counted twice, accepted though it must not be, or reported without its place; or
            one that is accepted trains a look-alike as words that is not counted, or has an image outside the folder
            or one that cannot be opened and is not reported by the check of images.
    """
    folder = folder / row_format
    folder.mkdir()
    write_images(folder)
    lines = list(broken_lines(row_format, count, seed, folder))
    path = folder / "rows.jsonl"
    # A file in which nothing beyond ASCII is UTF-8 is refused as a whole: the last line is.
    lines.append(("no_objects", True, '"é"'.encode()))
    path.write_bytes(b"\n".join(line for _, _, line in lines) + b"\n")
    odd = bool(seed % 2)
    settings = SETTINGS.get(row_format, {}) | ({"reply": ("value", "json")[odd]} if row_format == "fields" else {})
    samples = Samples([Source.model_construct(path=str(path), format=row_format, **settings)])
    rules = Rules(
        tokenizer,
        n_queries=4,
        max_length=1000,
        on_long="drop",
        on_bad_row="skip",
        box_edge=("error", "clamp")[odd],
        markup_as_text=ALL_MARKUP if odd else frozenset(),
    )
    found = look_at(samples, rules, show_progress=False)
    check_kept(samples, found, rules, folder)

    assert len(found.kept) + found.refused + len(found.dropped_long) == len(samples)
    fates = {"accepted": {samples[index].origin.row for index in found.kept.tolist()}}
    fates["reported"] = {problem.origin.row for problem in found.problems}
    fates["too_long"] = {long.origin.row for long in found.dropped_long} - fates["accepted"]
    assert fates["accepted"] | fates["reported"] | fates["too_long"] == set(range(1, count + 2))
    if row_format in ("vqa", "caption", "grounding", "fields"):
        # Of a row that makes several samples, one may hold what is refused.
        fates = {fate: rows - fates["reported"] if fate != "reported" else rows for fate, rows in fates.items()}
    assert not fates["reported"] & (fates["accepted"] | fates["too_long"])
    for problem in found.problems:
        assert isinstance(problem, BadRow)
        assert problem.origin.file == str(path)
        assert problem.field and problem.reason and len(str(problem)) < 1500, problem
    counts = Counter()
    for fate, rows in fates.items():
        for row in rows:
            kind, must_be_reported, line = lines[row - 1]
            assert fate == "reported" or not must_be_reported, (kind, fate, line[:300])
            if row <= count:
                counts[kind, fate] += 1
    return counts


ALL_MARKUP = check_markup_names([*LOOK_ALIKES, *BOXES])


def check_kept(samples: Samples, found: Checked, rules: Rules, folder: Path) -> None:
    """Check what the accepted samples train, in their ids, and open their images as training does.

    Raises:
        AssertionError: see `check_broken_rows`.
    """
    # Text by its ids: what is a token of the model is none of it.
    first = min(rules.tokenizer.control_tokens.values())
    looking = Counter()
    for index in found.kept.tolist():
        ids = rules.fit(samples[index].messages).rendered.ids
        text = rules.tokenizer.decode([one if one < first else SPACE for one in ids])
        seen = {look for look in SEEN if look in text}
        looking.update(seen)
        assert not seen or rules.markup_as_text, (samples[index].origin, seen, text[:2000])
    for look in looking:
        assert found.markup[markup_kind(look)] >= looking[look], (look, looking[look], found.markup)

    opened = open_images(samples, found, rules, show_progress=False)
    for problem in opened.problems:
        assert problem.origin.row and problem.field.startswith("images[") and len(str(problem)) < 1500
    root = os.path.realpath(folder)
    for index in without(found, opened).kept.tolist():
        for source in image_sources(samples[index].messages):
            if isinstance(source, str) and not source.startswith("data:"):
                file = find_page(source, folder)[0]
                assert Path(os.path.realpath(file)).parent == Path(root), source
                assert Path(file).name in ACCEPTED, source


SPACE = 220
"""A token of ordinary text."""
ACCEPTED = (
    "a.png",
    "b.jpg",
    "hash#1.png",
    "100%.png",
    "pages.pdf",
    "pages.tif",
    "pages.gif",
    "pages.webp",
    "both.tif#1",
)
"""The only files whose images may be trained."""
