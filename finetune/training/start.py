"""Where a run stands: it starts at step 0, resumes from a checkpoint, or is finished."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.data.places import Aligned
from finetune.data.samples import Samples
from finetune.errors import UserError
from finetune.recipe import Recipe, Train
from finetune.recipe.best_score import evaluates_when
from finetune.recipe.train_section import FIELDS, TRL_CHECKPOINTING
from finetune.run.checkpoints import clean_partials, find_last_good
from finetune.run.folder import RunFolder
from finetune.run.identity import compare_runs
from finetune.terminal import Say
from finetune.training.extension import EXTENSIONS, extension_of, made_longer, refuse_no_extension
from finetune.training.going_on import ADAPTER_FROM
from qwenvl.checkpoint.identity import BaseIdentity, differences, identity_from_json, identity_to_json

TRAIN_EMBEDDINGS = "train_embeddings"

FREE_TO_CHANGE = (
    # The base is known by its identity, wherever it is stored; so is an adapter that the run goes on from.
    *("model.path", "adapter.from"),
    *("output", "resume", "evaluate.predictions", "evaluate.overlap", "data.workers"),
    *("data.on_bad_row", "data.check_images"),  # what is left out is known by row, see `data.places`
    *("train.checkpointing", *(f"train.{key}" for key in TRL_CHECKPOINTING)),
    *(f"train.{key}" for key in ("logging_strategy", "logging_first_step", "log_level", "log_level_replica")),
    *(f"train.{key}" for key in ("save_strategy", "save_steps", "save_minutes", "save_total_limit")),
    *(f"train.{key}" for key in ("report_to", "run_name", "project")),
    *(f"train.dataloader_{key}" for key in ("pin_memory", "prefetch_factor", "persistent_workers")),
    "train.dataloader_multiprocessing_context",
)
"""Keys of a recipe that may change when a run is resumed: they do not change what is computed."""

CHANGES_ROUNDING = (
    *("data.tokens_per_batch", "data.vision_cache", "data.vision_cache_gb", "model.attention", "model.kernels"),
    # Whether a checkpoint can be read by another number of processes is found when it is read.
    *("train.parallel", "train.fsdp", "train.fsdp_config"),
)
"""Keys that may change too; the run then goes on, but not bit for bit as it would have, which is said."""


def free_to_change(recipe: Recipe) -> tuple[str, ...]:
    """The keys of a recipe that may change when its run is resumed."""
    evaluate, free = recipe.evaluate, [*FREE_TO_CHANGE, *CHANGES_ROUNDING]
    if evaluate is None or evaluate.task is None:
        # It decides a task's score, which picks the best checkpoint and is compared with that before training.
        free.append("evaluate.max_new_tokens")
    if evaluates_when(recipe.train, evaluate) != "steps" or recipe.train.eval_steps is not None:
        free.append("train.logging_steps")  # else it says when to evaluate
    return tuple(free)


@dataclass(frozen=True)
class Fresh:
    """Training starts at step 0."""


@dataclass(frozen=True)
class Resume:
    """Training goes on from a checkpoint.

    Attributes:
        extensions: where the run was made longer, oldest first, as JSON.
    """

    checkpoint: Path
    step: int
    extensions: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Finished:
    """The run has its result already."""


Start = Fresh | Resume | Finished


def run_identity(
    recipe: Recipe,
    samples: Mapping[str, Samples],
    base: BaseIdentity | None,
    train_embeddings: bool | None = None,
    adapter_from: str | None = None,
) -> dict[str, Any]:
    """What must be the same for a resume to continue a run: recipe, data and the base.

    Args:
        base: None in a process that leaves it to another one of its machine to read all of the base.
        train_embeddings: what `adapter.train_embeddings: auto` comes to, by the base's `chat_format`; None where the
            recipe says it, or there is no adapter.
        adapter_from: SHA-256 of the adapter that the run goes on from; None where there is none.
    """
    return {
        "recipe": recipe.model_dump(mode="json"),
        "data": {name: part.fingerprint() for name, part in samples.items()},
        **({} if base is None else {"base": identity_to_json(base)}),
        **({} if train_embeddings is None else {TRAIN_EMBEDDINGS: train_embeddings}),
        **({} if adapter_from is None else {ADAPTER_FROM: adapter_from}),
    }


def with_new_keys(identity: Mapping[str, Any]) -> dict[str, Any]:
    """A stored identity with the keys that recipes got since then, at their defaults: those say what was done before.

    A recipe that is not one any more stays as it is.
    """
    try:
        then = _without_refused_fields(identity["recipe"])
        recipe = Recipe.model_validate_json(json.dumps(then)).model_dump(mode="json")
    except (ValidationError, KeyError):
        return dict(identity)
    return {**identity, "recipe": recipe}


def _without_refused_fields(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A stored recipe without fields of `SFTConfig` that are refused by now, where it left them at their defaults."""
    train = {
        name: value
        for name, value in recipe["train"].items()
        if name in Train.model_fields or name not in FIELDS or value != FIELDS[name]["default"]
    }
    return {**recipe, "train": train}


def _changes_of(keys: Collection[str], then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """`model.attention: "varlen" -> "sdpa"`, for each of some keys of a recipe that is not what it was."""
    recipes = ({"recipe": identity.get("recipe", {})} for identity in (then, now))
    for change in compare_runs(*recipes):
        change = change.removeprefix("recipe.")
        if change.split(":")[0] in keys:
            yield change


def find_start(
    run: RunFolder,
    recipe: Recipe,
    identity: Mapping[str, Any],
    stored: Mapping[str, Any] | None,
    say: Say,
    *,
    aligned: Mapping[str, Aligned] | None = None,
    extend: bool = False,
) -> Start:
    """Find where a run stands, and clear what a killed process left behind; for the main process.

    Args:
        identity: of the run about to start, see `run_identity`.
        stored: what run.json says; None where there is none.
        aligned: where the rows of each part of the data are now, if the run folder tells what they were; the data's
            fingerprints are compared where it does not.
        extend: the run is to become longer, by the recipe's epochs or steps.

    Raises:
        UserError: the folder holds a run of another recipe, other data or another base, or resume is never; or it
            cannot become longer.
    """
    longer_by = refuse_no_extension(run, stored, identity["recipe"]) if extend else ""
    clean_partials(run.path)
    clean_partials(run.checkpoints)
    if stored is None or "identity" not in stored:
        return Fresh()
    aligned = {} if aligned is None else aligned
    ignored = [
        "base",
        TRAIN_EMBEDDINGS,
        *(f"recipe.{key}" for key in free_to_change(recipe)),
        *(f"data.{name}" for name in aligned),
        *([f"recipe.train.{longer_by}"] if longer_by else []),
    ]
    then = with_new_keys(stored["identity"])
    changes = compare_runs(then, dict(identity), ignore=ignored)
    changes += [f"data.{name}: {change}" for name, part in aligned.items() for change in part.changes]
    was, now = (each.get(TRAIN_EMBEDDINGS) for each in (stored["identity"], identity))
    if None not in (was, now) and was != now:  # runs of before have not noted it
        changes.append(
            f"adapter.train_embeddings: auto was {str(was).lower()}, is {str(now).lower()}: the base's chat_format "
            "was changed"
        )
    if "base" in identity:
        bases = [identity_from_json(each.get("base"), run.run_file) for each in (stored["identity"], identity)]
        changes += [f"base: {change}" for change in differences(*bases)]
    if changes:
        longer = made_longer(stored["identity"].get("recipe"), identity["recipe"])
        only = longer is not None and [change.partition(":")[0] for change in changes] == [f"recipe.train.{longer}"]
        raise UserError(
            f"{run.path} holds a run that this one would not continue:\n  "
            + "\n  ".join(changes)
            + ("\nTo go on with it for that long, add --extend. Else give" if only else "\nGive")
            + " another output, or remove that folder"
        )
    if recipe.resume == "never":
        raise UserError(
            f"{run.path} holds a run already, and resume is never\nGive another output, or remove that folder"
        )
    if stored.get("status") == "finished" and not longer_by:
        result = run.adapter if recipe.adapter is not None else run.path / "model"
        if not result.is_dir():
            raise UserError(
                f"{run.path} is finished, but its result, {result}, is gone: restore it, or give another output to "
                "train again"
            )
        return Finished()
    last = find_last_good(run.checkpoints)
    extensions = list(stored.get(EXTENSIONS, ()))
    if longer_by and (extension := extension_of(run, stored, identity["recipe"], longer_by, last)) is not None:
        extensions.append(extension.to_json())
        say("extend", f"{extension.key} was {extension.was}, is {extension.now}")
    for folder, reason in last.damaged:
        say("resume", f"{folder.name} is damaged ({reason}): going back to the one before")
    # A run that starts again logs its scores of step 0 again.
    run.forget_metrics_after(last.step if last.path is not None else -1)
    if last.path is None:
        return Fresh()
    say("resume", f"from step {last.step}")
    for change in _changes_of(CHANGES_ROUNDING, then, identity):
        say("", f"{change}: the run goes on, though not bit for bit as it would have")
    for name, part in aligned.items():
        for note in part.notes(name):
            say("", note)
    return Resume(last.path, last.step, tuple(extensions))
