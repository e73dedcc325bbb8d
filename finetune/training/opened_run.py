"""What is known of a run before its weights are loaded: its data, where it stands, and how its processes share it."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from finetune.files.base_identity import identify
from finetune.model.base import Base, embeddings_by_auto, find_base
from finetune.model.computing import ComputeBackends, choose_backends, computing_dtype
from finetune.model.given_adapter import GivenAdapter
from finetune.recipe import Recipe
from finetune.run.folder import RunFolder
from finetune.run.launch import is_main_process, launched_processes
from finetune.run.meeting import Meeting
from finetune.terminal import Say
from finetune.training.folder_of_run import folder_of_run, require_the_same
from finetune.training.going_on import settle_given_adapter
from finetune.training.parallel import Parallel
from finetune.training.start import Resume, Start, find_start, run_identity
from finetune.training.step_samples import keep_samples_per_step, step_samples_before
from finetune.training.training_data import (
    EACH_EPOCH,
    WEIGHTS,
    RowPlaces,
    TrainingData,
    data_as_it_was,
    find_places,
    read_data,
)
from finetune.training.zero import refuse_other_checkpoint
from qwenvl.checkpoint.identity import BaseIdentity


@dataclass(frozen=True)
class OpenedRun:
    """A run that is about to load its weights.

    Attributes:
        recipe: with `adapter` as the adapter has it that the run goes on from.
        stepped: the recipe of this part of the run: with the folder that this process reads, and as many accumulation
            steps as keep the samples of a step.
        parallel: how the processes share the work.
        run: the folder that this process reads; the main one writes it.
        shares_folder: whether all processes see the main one's.
        stored: run.json of the parts before this one; None where there is none.
        base: the checkpoint that training starts from.
        base_identity: what all of it is; None in a process that leaves it to another one of its machine to read.
        identity: what a resume must have the same.
        computing: what attention and layers are computed with.
        computes_in: dtype of frozen weights and activations.
        data: of a run that goes on, with the rows as they were numbered when it began.
        places: of the rows.
        start: where the run stands.
        given: the adapter whose weights training begins with; None for a new one, or in a run that resumes.
        is_main: whether this process writes and speaks.
    """

    recipe: Recipe
    stepped: Recipe
    parallel: Parallel
    run: RunFolder
    shares_folder: bool
    stored: Mapping[str, Any] | None
    base: Base
    base_identity: BaseIdentity | None
    identity: Mapping[str, Any]
    computing: ComputeBackends
    computes_in: torch.dtype
    data: TrainingData
    places: RowPlaces
    start: Start
    given: GivenAdapter | None = None
    is_main: bool = True

    @property
    def resumes(self) -> bool:
        return isinstance(self.start, Resume)

    @property
    def before(self) -> Mapping[str, Any] | None:
        """run.json of the parts before, of a run that goes on from a checkpoint; None of one that begins."""
        return self.stored if self.resumes else None


def open_run(
    recipe: Recipe,
    parallel: Parallel,
    run: RunFolder,
    meeting: Meeting | None,
    until_closed: ExitStack,
    say: Say,
    *,
    extend: bool,
) -> OpenedRun:
    """Read and check the data, and find where the run stands.

    Args:
        run: as the recipe names it; the main process holds it.
        meeting: of the processes; None where there is one.
        until_closed: keeps what this process copies of a run folder that it does not see.
        extend: the run is to become longer.

    Raises:
        InputError: data, checkpoint or folder are wrong; the message says what to do.
    """
    is_main = is_main_process()
    base = find_base(recipe.model)
    recipe, given, given_sha256 = settle_given_adapter(recipe, base, run, run.read_run())
    computing = choose_backends(recipe.model)
    say("model", f"{recipe.model.path}: {computing}{base.taken_for}")
    if parallel.note:
        say("note", parallel.note)
    data = read_data(recipe, base.processor, say, show_progress=is_main, seq_length=base.seq_length)

    # Only now, with the data known to be right: for a hub id this downloads the weights.
    # All of it is read, by one process of each machine.
    reads_base = is_main or os.environ.get("LOCAL_RANK", "0") == "0"
    base_identity = identify(base.path, page_cache=True) if reads_base else None
    if given is not None and base_identity is not None:
        given.refuse_other_base(base.path, base_identity)
    identity = run_identity(recipe, data.samples, base_identity, embeddings_by_auto(recipe, base), given_sha256)
    require_the_same(meeting, identity)

    folder = until_closed.enter_context(folder_of_run(run, meeting, say))
    folder.require_for(recipe, parallel)
    run = folder.run
    stored = run.read_run()
    places = find_places(data, identity["data"], run, stored)
    found = None
    if is_main:
        found = find_start(run, recipe, identity, stored, say, aligned=places.aligned, extend=extend)
    start = folder.start_of_main(found, say)

    stepped = recipe.model_copy(update={"output": str(run.path)})
    if isinstance(start, Resume):
        refuse_other_checkpoint(start.checkpoint, parallel)
        data = _drawn_as_it_began(data_as_it_was(data, places), recipe, stored, say)
        before = step_samples_before(stored or {}, recipe, start.checkpoint)
        samples = len(data.checked["train"].first_epoch(recipe.seed))
        stepped = keep_samples_per_step(stepped, before, launched_processes(), samples, say)
    return OpenedRun(
        recipe,
        stepped,
        parallel,
        run,
        folder.is_shared,
        stored,
        base,
        base_identity,
        identity,
        computing,
        computing_dtype(recipe.model, base.path, base.dtype),
        data,
        places,
        start,
        given=None if isinstance(start, Resume) else given,
        is_main=is_main,
    )


def _drawn_as_it_began(data: TrainingData, recipe: Recipe, stored: Mapping[str, Any] | None, say: Say) -> TrainingData:
    """The data of a run that goes on, drawn once for all epochs if it began before each epoch had its own draw."""
    if stored is None or stored.get(WEIGHTS) == EACH_EPOCH:
        return data
    if data.checked["train"].epochs(recipe.seed) is not None:
        say("weights", "this run drew its samples once for all epochs when it began, and goes on with those")
    return data.drawn_once()
