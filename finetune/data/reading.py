"""Open and check the data of a recipe: the first step of training and of `finetune check`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.checks.checked import Checked
from finetune.data.checks.checking import look_at, refusal
from finetune.data.checks.image_check import CheckImages, OpenedImages, open_images, without
from finetune.data.checks.markup import check_markup_names
from finetune.data.checks.overlap import find_overlap
from finetune.data.checks.rules import Rules
from finetune.data.formats.places import PLACE
from finetune.data.images.pages import Pages
from finetune.data.sample import DataError
from finetune.data.samples import Samples
from finetune.errors import InputError
from finetune.recipe import Recipe, Source
from finetune.terminal import Say, say_nothing
from qwenvl import ImageAccess, QwenVLProcessor
from qwenvl.views import Views


@dataclass(frozen=True)
class DataPart:
    """The training or the evaluation data of a recipe.

    Attributes:
        sources: of the recipe, those that could be opened.
        samples: of these sources; None where there are none.
        checked: what was found in them; None with `samples`.
        errors: why a run would not train on this; empty where it would.
        opened: the result of opening the images; None where they were not opened.
    """

    sources: Sequence[Source]
    samples: Samples | None
    checked: Checked | None
    errors: Sequence[InputError]
    opened: OpenedImages | None = None


def rules_of(recipe: Recipe, processor: QwenVLProcessor) -> Rules:
    """How a recipe checks and renders a sample.

    Raises:
        UserError: `data.markup_as_text` names what is not looked for.
    """
    data = recipe.data
    return Rules(
        processor.tokenizer,
        data.max_length,
        processor.n_queries,
        data.labels,
        data.grounding,
        data.on_long,
        data.on_bad_row,
        data.box_edge,
        identify=recipe.evaluate is not None,
        markup_as_text=check_markup_names(data.markup_as_text),
        views=views_of(recipe),
        train_on=data.train_on,
    )


def views_of(recipe: Recipe) -> Views | None:
    """What pictures an image becomes by a recipe."""
    given = recipe.data.views
    return None if given is None else Views(given.page, (given.grid[0], given.grid[1]), given.overlap)


def pages_of(recipe: Recipe) -> Pages | None:
    """How a recipe reads files of several pages."""
    given = recipe.data.pages
    return None if given is None else Pages(given.dpi, given.first, given.on_more)


def read_checked(
    recipe: Recipe,
    processor: QwenVLProcessor,
    *,
    show_progress: bool = True,
    processes: int | None = None,
    opens_images: bool = True,
    say: Say = say_nothing,
) -> dict[str, tuple[Samples, Checked]]:
    """The samples of "train" and, where there is evaluation, of "eval", all of them checked.

    Args:
        show_progress, processes: see `checking.look_at`.
        opens_images: False in processes of a run beside the first of a machine, where what it finds stops all of them,
            and where each image is decoded anyway.
        say: prints what was left unopened.

    Raises:
        MissingFileError, DataError: why a run would not train on this, for both parts together.
        WorkerDied: a worker process was killed or crashed.
    """
    # What is left out must be the same in all processes.
    opens_images = opens_images or recipe.data.on_bad_row == "skip"
    mode = recipe.data.check_images if opens_images else None
    parts = look_at_data(recipe, processor, show_progress=show_progress, processes=processes, check_images=mode)
    for part in parts.values():
        if part.opened is not None and part.opened.note:
            say("images", part.opened.note)
    errors = [(name, error) for name, part in parts.items() for error in part.errors]
    if len(errors) == 1:
        raise errors[0][1]
    if errors:
        raise DataError("\n".join(f"{name} data: {error}" for name, error in errors))
    read = {}
    for name, part in parts.items():
        assert part.samples is not None and part.checked is not None, "without errors all sources were opened"
        read[name] = part.samples, part.checked
    return read


def look_at_data(
    recipe: Recipe,
    processor: QwenVLProcessor,
    *,
    show_progress: bool = True,
    processes: int | None = None,
    check_images: CheckImages | None = "auto",
) -> dict[str, DataPart]:
    """As `read_checked`, but errors are returned, and the other sources are checked where one cannot be opened.

    Args:
        check_images: how images are opened, see `image_check.open_images`; None does not. Where bad rows are skipped,
            only "all" opens images: others are left out when they are met.

    Raises:
        WorkerDied: a worker process was killed or crashed.
    """
    parts: dict[str, Sequence[Source]] = {"train": recipe.data.train}
    if recipe.evaluate is not None:
        parts["eval"] = recipe.evaluate.data
    rules = rules_of(recipe, processor)
    looked_at = {}
    for name, sources in parts.items():
        kept, samples, errors = _open(recipe, sources)
        checked = opened = None
        if samples is not None:
            checked = look_at(samples, rules, show_progress=show_progress, processes=processes)
            checked = replace(checked, redraws=name == "train")
            if error := refusal(checked, rules):
                errors.append(error)
            if check_images == "all" or (check_images is not None and rules.on_bad_row == "error" and not errors):
                opened = open_images(
                    samples, checked, rules, check_images, show_progress=show_progress, processes=processes
                )
                if rules.on_bad_row == "skip":
                    checked = without(checked, opened)
                elif opened.problems:
                    errors.append(DataError(_undecodable(opened, checked), opened.problems))
                if not len(checked.kept) and not errors:
                    errors.append(DataError("no image of its samples can be decoded:", checked.problems))
        looked_at[name] = DataPart(kept, samples, checked, errors, opened)
    return looked_at


def look_for_overlap(recipe: Recipe, parts: Mapping[str, tuple[Samples, Checked]]) -> list[str]:
    """What is evaluated on and trained on as well, in lines for the user; none where there is no such.

    Args:
        parts: "train" and, where there is evaluation, "eval".

    Raises:
        DataError: there is, and the recipe says `evaluate.overlap: error`.
    """
    if recipe.evaluate is None or "train" not in parts or "eval" not in parts:
        return []
    (train, trained), (evals, asked) = parts["train"], parts["eval"]
    lines = find_overlap(train, trained.kept, trained.identities, evals, asked.kept, asked.identities).lines()
    if len(lines) > 1 and recipe.evaluate.overlap == "error":
        raise DataError("; ".join(lines))
    return lines


def _undecodable(opened: OpenedImages, checked: Checked) -> str:
    return (
        f"of {checked.total:,} samples, {len(opened.samples):,} have images that cannot be decoded (mend them or take "
        "their rows out, or leave them out with on_bad_row: skip):"
    )


def _open(recipe: Recipe, sources: Sequence[Source]) -> tuple[Sequence[Source], Samples | None, list[InputError]]:
    """The sources that can be opened, their samples, and why the others cannot."""
    try:
        return sources, open_samples(recipe, sources), []
    except InputError as error:
        if len(sources) == 1:
            return [], None, [error]
    opened: list[Source] = []
    errors: list[InputError] = []
    for source in sources:
        try:
            open_samples(recipe, [source])
            opened.append(source)
        except InputError as error:
            errors.append(error)
    return opened, open_samples(recipe, opened) if opened else None, errors


def open_samples(recipe: Recipe, sources: Sequence[Source]) -> Samples:
    """The samples of sources, read as the recipe says; errors as of `Samples`."""
    data = recipe.data
    root = None if data.images_root is None else Path(data.images_root)
    return Samples(
        sources,
        images_root=root,
        access=ImageAccess(root=root, allow_urls=data.allow_urls),
        no_object=data.no_object,
        pages=pages_of(recipe),
        ignore=data.ignore,
        text_places=PLACE not in check_markup_names(data.markup_as_text),
    )
