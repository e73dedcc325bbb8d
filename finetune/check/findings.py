"""Everything that a run does before it loads weights: model, data, what is trained; and all problems together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from finetune.batches.budget import ChosenBudget, packing_budget
from finetune.check.epoch_estimate import Epoch, estimate_epoch
from finetune.check.export_layout import looks_like
from finetune.check.legibility import Legibility, look_at_letters
from finetune.check.sample_preview import Preview, choose_samples, preview
from finetune.data.checks.image_check import OpenedImages
from finetune.data.reading import DataPart, look_at_data, look_for_overlap, rules_of
from finetune.data.sample import BadRow, DataError
from finetune.errors import InputError
from finetune.evaluation.task_evaluation import TaskEvaluation
from finetune.memory.auto_budget import choose_budget
from finetune.memory.free_memory import describe_cards
from finetune.memory.run_plan import RunPlan, look_at_memory, settled
from finetune.memory.several_cards import describe_several, fewest_cards
from finetune.memory.sharding import sharding_of
from finetune.memory.switches import Switches
from finetune.model.base import Base, build_without_weights, find_base, refuse_text_only_samples
from finetune.model.components import Count, count_parameters
from finetune.model.computing import computing_dtype
from finetune.model.given_adapter import GivenAdapter, find_given_adapter
from finetune.recipe import Recipe
from finetune.run.launch import planned_processes
from finetune.training.arguments import trainer_arguments
from finetune.training.parallel import asked_for, own_launch, refuse_impossible, settle_parallel
from finetune.training.processes import as_one_process
from finetune.training.settings_check import check_settings
from finetune.vision_cache.phase import describe_phase
from qwenvl import QwenVLConfig
from qwenvl.base_check import identify_base


@dataclass
class Findings:
    """What a check found.

    Attributes:
        given: the adapter that the run goes on from; None where there is none.
        parameters: per component; None where the model cannot be set up as the recipe says.
        parts: "train" and, where there is evaluation, "eval".
        budget: tokens of one forward; None, like the epoch, where no training sample is left.
        overlap: what is evaluated on and trained on as well, in lines.
        task: description of the evaluation's task.
        vision_cache: description of the phase that encodes the images; None where there is none.
        memory: what a run on this machine would hold; None where the model cannot be set up or no sample is left.
        notes: what is to be said of the settings of `train`.
        cards: which usual GPUs it fits, and for full training how many of them.
        opened: for each part, if images were opened.
        legibility: of the text on some images of each part that has any.
        refusals: (what, why) of everything at which a run would stop.
    """

    recipe: Recipe
    base: Base
    given: GivenAdapter | None = None
    parameters: dict[str, Count] | None = None
    parts: dict[str, DataPart] = field(default_factory=dict)
    budget: ChosenBudget | None = None
    epoch: Epoch | None = None
    overlap: list[str] = field(default_factory=list)
    task: str | None = None
    vision_cache: str | None = None
    memory: RunPlan | None = None
    notes: list[str] = field(default_factory=list)
    cards: str = ""
    opened: dict[str, OpenedImages] = field(default_factory=dict)
    legibility: dict[str, Legibility] = field(default_factory=dict)
    previews: list[Preview] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)

    def problems(self, name: str) -> list[BadRow]:
        """What is wrong with the rows of a part, those left out included, and images that cannot be decoded."""
        part = self.parts[name]
        refused = [problem for error in part.errors if isinstance(error, DataError) for problem in error.problems]
        # Rows that are refused are in both lists; those that are skipped only in the second.
        found = dict.fromkeys([*refused, *(part.checked.problems if part.checked is not None else ())])
        found |= dict.fromkeys(self.opened[name].problems if name in self.opened else ())
        return [*found]

    def skipped(self, name: str) -> int:
        """How many rows of a part are left out because of a problem."""
        checked = self.parts[name].checked
        return len(checked.problems) if checked is not None and self.recipe.data.on_bad_row == "skip" else 0


def look_before_training(recipe: Recipe, *, samples: int, images: bool, processes: int | None = None) -> Findings:
    """Do everything of a check except showing it.

    Args:
        recipe: the resolved recipe.
        samples: how many to prepare for display.
        images: decode every image, whatever `data.check_images` says.
        processes: see `checking.look_at`.

    Raises:
        InputError: there is no model to check the data with.
        WorkerDied: one of several processes ended unexpectedly.
    """
    findings = Findings(recipe, find_base(recipe.model))
    try:
        findings.recipe, findings.given = find_given_adapter(recipe, findings.base)
        if findings.given is not None and Path(findings.base.path).is_dir():
            identity = identify_base(findings.base.path, cached=True)
            findings.given.refuse_other_base(findings.base.path, identity)
    except InputError as error:
        findings.refusals.append(("adapter", str(error)))
    recipe = findings.recipe
    base, rules = findings.base, rules_of(recipe, findings.base.processor)
    mode = "all" if images else recipe.data.check_images
    findings.parts = look_at_data(recipe, base.processor, processes=processes, check_images=mode)
    findings.opened = {name: part.opened for name, part in findings.parts.items() if part.opened is not None}
    for name, part in findings.parts.items():
        findings.refusals += [(f"{name} data", _without_rows(error)) for error in part.errors]
    findings.refusals += _exports_as_rows(recipe, findings.parts)
    training = findings.parts["train"].checked
    whole = {
        name: (part.samples, part.checked)
        for name, part in findings.parts.items()
        if part.samples is not None and part.checked is not None
    }
    try:
        findings.overlap = look_for_overlap(recipe, whole)
    except DataError as error:
        findings.refusals.append(("eval data", str(error)))
    adapter_fits = all(what != "adapter" for what, _ in findings.refusals)
    try:
        model = build_without_weights(recipe, base) if adapter_fits else None
        findings.parameters = None if model is None else count_parameters(model)
        if training is not None and model is not None:
            refuse_text_only_samples(model, training)
    except InputError as error:
        findings.refusals.append(("model", str(error)))
    if training is not None and len(training.kept):
        findings.budget = ChosenBudget(packing_budget(recipe.data, training.lengths))
        can_be_planned = adapter_fits and all(what != "model" for what, _ in findings.refusals)
        if can_be_planned:
            config = QwenVLConfig.from_pretrained(base.path)
            cards = planned_processes() if planned_processes() > 1 else torch.cuda.device_count()
            sharding = sharding_of(asked_for(recipe.train) or own_launch().plugin, cards)
            findings.budget = choose_budget(settled(recipe, base.path), config, training, sharding=sharding)
        findings.epoch = estimate_epoch(recipe, training, findings.budget.tokens)
        if can_be_planned:
            budget = findings.budget.tokens
            findings.memory = look_at_memory(recipe, base.path, training, budget, sharding=sharding)
            if recipe.adapter is None:
                findings.cards = describe_several(fewest_cards(recipe, config, findings.memory.plan.workload))
            else:
                findings.cards = describe_cards(findings.memory.plan.peak)
            if findings.memory.refusal:
                findings.refusals.append(("memory", findings.memory.refusal))
    task = None
    if recipe.evaluate is not None and recipe.evaluate.task is not None:
        try:
            task = TaskEvaluation(recipe, base.processor)
            findings.task = str(task)
        except InputError as error:
            # The same rows as the evaluation data's, in another form: one example is enough.
            problems = error.problems if isinstance(error, DataError) else []
            example = f", such as {problems[0]}" if problems else ""
            findings.refusals.append(("eval task", _without_rows(error) + example))
    if findings.memory is not None and findings.epoch is not None and "eval task" not in dict(findings.refusals):
        try:
            computes_in = computing_dtype(recipe.model, base.path, base.dtype)
            findings.notes = _settings_notes(
                recipe, findings.memory.switches, computes_in, findings.epoch.samples, task
            )
        except InputError as error:
            findings.refusals += [("settings", line) for line in str(error).splitlines()]
    if not findings.refusals:
        findings.vision_cache = describe_phase(
            recipe, QwenVLConfig.from_pretrained(base.path), base.processor, findings.parts, task, processes
        )
    side = int(base.processor.image_processor.size["height"])
    for name, (opened, checked) in whole.items():
        if checked.images.any():
            findings.legibility[name] = look_at_letters(opened, checked, rules, side)
    for name, index in choose_samples(findings.parts, samples, recipe.seed):
        chosen = findings.parts[name].samples
        assert chosen is not None, "samples are chosen from parts that were opened"
        findings.previews.append(preview(name, chosen[index], rules))
    return findings


def _settings_notes(
    recipe: Recipe, switches: Switches, computes_in: torch.dtype, samples: int, task: TaskEvaluation | None
) -> list[str]:
    """What is to be said of the settings of `train`, as the trainer would have them.

    Raises:
        UserError: a run would stop at them.
    """
    processes = planned_processes()
    refuse_impossible(recipe, settle_parallel(recipe.train, replace(own_launch(), processes=processes)))
    # How processes share the model is settled by them when they start, and a check is one process.
    alone = {"deepspeed": None, "fsdp": None, "fsdp_config": None}
    unshared = recipe.model_copy(update={"train": recipe.train.model_copy(update=alone)})
    with as_one_process():
        arguments = trainer_arguments(unshared, switches, None if task is None else task.key, computes_in)
    return check_settings(recipe, arguments, samples=samples, processes=processes, task=task)


def _exports_as_rows(recipe: Recipe, parts: Mapping[str, DataPart]) -> Iterator[tuple[str, str]]:
    """Sources of parts with errors that are read as plain rows and look like the export of an annotation tool."""
    sources = {"train": recipe.data.train, "eval": recipe.evaluate.data if recipe.evaluate is not None else ()}
    for name, part in parts.items():
        for source in sources[name] if part.errors else ():
            layout = None if source.annotations is not None else looks_like(Path(source.path))
            if layout is not None:
                reason = (
                    f"{source.path} looks like an annotation export, which `annotations: {{layout: {layout}}}` reads"
                )
                yield f"{name} data", reason


def _without_rows(error: Exception) -> str:
    """The message without the rows that it lists: they are shown already."""
    return error.message.rstrip(":") if isinstance(error, DataError) else str(error)
