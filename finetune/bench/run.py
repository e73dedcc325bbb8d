"""Measure one row of the bench: train with a run's trainer on batches of known lengths."""

import base64
import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.bench.arithmetic import Trained
from finetune.bench.card_speed import Peak
from finetune.bench.flops import executed_flops, packs_of, published_flops, useful_flops
from finetune.bench.measure import StepMeter
from finetune.bench.published import PUBLISHED_ARGUMENTS, PUBLISHED_SWITCHES, PublishedTrainer
from finetune.bench.subject import Subject
from finetune.bench.table import PUBLISHED, SAMPLES, Row
from finetune.bench.workload import MIX, BenchCollator, Lengths, PaddedCollator, draw_lengths
from finetune.data.checks.checked import Checked
from finetune.memory.auto_budget import choose_budget
from finetune.memory.auto_switches import choose_switches
from finetune.memory.free_memory import USABLE, free_device_memory
from finetune.memory.out_of_memory import DoesNotFit
from finetune.memory.plan import plan_memory
from finetune.memory.switches import Switches
from finetune.memory.workload import Workload
from finetune.model.adapters import TrainableModel, without_adapter
from finetune.model.computing import choose_backends
from finetune.model.lora_products import multiply_as_peft
from finetune.quantities import format_bytes
from finetune.recipe import Recipe
from finetune.run.folder import RunFolder
from finetune.training.arguments import loader_settings, mixed_precision, sft_config
from finetune.training.progress import drop_own_printers
from finetune.training.trainer import QwenVLTrainer
from finetune.vision_cache.phase import remove_vision_tower
from qwenvl import QwenVLConfig, QwenVLTokenizer
from qwenvl.model.kernels import use_kernels

T = TypeVar("T")

STEPS_ONLY: dict[str, Any] = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "load_best_model_at_end": False,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}
"""Fields of `SFTConfig`: nothing is evaluated, saved or logged, and the learning rate is constant."""


@dataclass(frozen=True)
class Way:
    """A way to train that is measured at several lengths.

    Attributes:
        weights: lora, qlora or full.
        settings: ours or published.
        recipe: all else; for the published settings, that of `published.published_recipe`.
        subject: the model.
        device: where it trains.
        peak: the device's peak arithmetic.
    """

    weights: str
    settings: str
    recipe: Recipe
    subject: Subject
    device: torch.device
    peak: Peak

    @property
    def batch(self) -> int:
        """Samples of one batch: the recipe's number if it divides `SAMPLES`, else all samples of a step."""
        if self.settings == PUBLISHED:
            return PUBLISHED_ARGUMENTS["per_device_train_batch_size"]
        wished = self.recipe.train.per_device_train_batch_size
        return wished if SAMPLES % wished == 0 else SAMPLES


def longest_sample(recipe: Recipe, config: QwenVLConfig) -> int:
    """Most tokens of a sample of the mix, to which the published settings pad: `data.max_length`, or the model's
    training context (2048, as in the published script) if that is less.
    """
    return min(recipe.data.max_length or config.seq_length, config.seq_length)


def run_row(way: Way, samples: str, *, warm_up: int, steps: int) -> Row:
    """Train a new model for some steps on samples of one kind, and measure them.

    Args:
        samples: see `workload.draw_lengths`.
        warm_up: steps before the measured ones.
        steps: to be measured.

    Raises:
        UserError: `samples` are too short for an image, the recipe's limit is too short for the mix, or the model
            cannot be trained as the recipe says.
    """
    row = _Row(way, samples, StepMeter(way.device, warm_up=warm_up, steps=steps))
    return row.measured()


class _Row:
    """A row that is being measured.

    Attributes:
        padded_to: tokens that the published settings pad to; None for ours.
        budget: tokens of one forward; None is one conversation at a time.
    """

    def __init__(self, way: Way, samples: str, meter: StepMeter):
        self.way, self.samples, self.meter = way, samples, meter
        self.config = way.subject.config
        self.recipe = way.subject.settled(_with_batch(way.recipe, way.batch))
        most = longest_sample(self.recipe, self.config)
        count = len(meter.all_steps) * SAMPLES
        self.lengths = draw_lengths(samples, count, self.config, most=most, seed=self.recipe.seed)
        self.padded_to: int | None = None
        if way.settings == PUBLISHED:
            self.padded_to = most if samples == MIX else int(samples)
        self.budget = self._budget() if self.padded_to is None else None
        self.switches = self._switches()

    def measured(self) -> Row:
        row = Row(self.way.weights, self.way.settings, self.samples, self.padded_to)
        plan = self._plan()
        if self.padded_to is None:
            row = replace(row, plan=plan, switches=_described(self.switches, self.budget, self.way.batch))
        if self.way.device.type == "cpu" and plan > (free := free_device_memory()):
            # The system would not refuse the allocation but kill the process.
            return replace(row, note=f"not tried: it needs {format_bytes(plan)}, and {format_bytes(free)} are free")
        outcome = _fitting(self._train)
        if isinstance(outcome, OutOfMemory):
            return replace(row, note=f"out of memory ({outcome.said})")
        trained, budget = outcome
        note = ""
        if budget != self.budget:
            note = f"packs of up to {self.budget:,} tokens did not fit: up to {budget:,} from then on"
        lengths = self._samples_of(self.meter.timed_steps)
        packs = packs_of(lengths, budget, self.way.batch)
        return replace(
            row,
            tokens=sum(sample.tokens for sample in lengths),
            forwards=len(packs),
            seconds=tuple(self.meter.seconds),
            peak=self.meter.peak,
            reserved=self.meter.reserved,
            useful=useful_flops(self.config, trained, lengths, encodes=self._encodes),
            executed=self._executed(trained, packs),
            peak_flops=self.way.peak.flops,
            note=note,
        )

    @property
    def _encodes(self) -> bool:
        """Whether the vision tower encodes the images."""
        return self.switches.vision_cache == "off"

    def _executed(self, trained: Trained, packs: Sequence[Sequence[Lengths]]) -> int:
        if self.padded_to is not None:
            return published_flops(self.config, trained, packs, padded_to=self.padded_to)
        return executed_flops(
            self.config,
            trained,
            packs,
            attention=self.switches.attention,
            checkpointing=self.switches.checkpointing,
            encodes=self._encodes,
        )

    # --- before ------------------------------------------------------------------------------------------------------

    def _budget(self) -> int | None:
        """Tokens of one forward, as in a run of the recipe on such samples."""
        return choose_budget(self.recipe, self.config, _checked(self.lengths)).tokens

    def _samples_of(self, steps: range) -> list[Lengths]:
        return self.lengths[steps.start * SAMPLES : steps.stop * SAMPLES]

    def _workload(self, steps: range) -> Workload:
        """The largest forward of these steps, in each respect."""
        lengths = self._samples_of(steps)
        if self.padded_to is not None:
            images = max(sample.images for sample in lengths)
            # Logits are computed at every position, as if every token were supervised.
            return Workload(self.padded_to, self.padded_to - 1, 1, images, self.padded_to)
        packs = packs_of(lengths, self.budget, self.way.batch)
        return Workload(
            tokens=max(sum(sample.tokens for sample in pack) for pack in packs),
            supervised=max(sum(sample.supervised for sample in pack) for pack in packs),
            sequences=max(len(pack) for pack in packs),
            images=max(sum(sample.images for sample in pack) for pack in packs),
            sequence_length=max(sample.tokens for sample in lengths),
        )

    def _switches(self) -> Switches:
        kind = self.way.device.type
        if self.padded_to is not None:
            return replace(PUBLISHED_SWITCHES, device_type=kind)
        capacity = int(free_device_memory() * USABLE)
        workload = self._workload(self.meter.all_steps)
        switches = choose_switches(self.recipe, self.config, workload, capacity, device_type=kind)
        backends = choose_backends(self.recipe.model)
        return replace(switches, attention=backends.attention, kernels=backends.kernels)

    def _plan(self) -> int:
        """Bytes that the memory plan predicts for the steps whose memory is measured.

        The plan assumes our loss: it is too low for the published settings.
        """
        workload = self._workload(self.meter.counted_steps)
        return plan_memory(self.recipe, self.config, workload, switches=self.switches)["train"].total

    # --- training ----------------------------------------------------------------------------------------------------

    def _train(self) -> tuple[Trained, int | None]:
        """Train; return what was trained and the packing budget at the end."""
        way, recipe = self.way, self.recipe
        model = way.subject.make_model(recipe, way.device)
        trained = Trained.of(model)
        with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
            trainer = self._make_trainer(model, Path(folder))
            try:
                trainer.train()
            finally:
                self.meter.close()
        return trained, trainer.train_budget.tokens

    def _make_trainer(self, model: TrainableModel, folder: Path) -> QwenVLTrainer:
        way, recipe, switches = self.way, self.recipe, self.switches
        given = {
            **recipe.train_arguments(),
            **switches.train_arguments,
            **STEPS_ONLY,
            **loader_settings(0, SAMPLES // way.batch),
            "dataloader_prefetch_factor": None,
            "dataloader_persistent_workers": False,
            "max_steps": len(self.meter.all_steps),
            **(PUBLISHED_ARGUMENTS if self.padded_to is not None else {}),
            **mixed_precision(way.subject.dtype(recipe), in_full=recipe.adapter is None),
        }
        base = without_adapter(model)
        base.set_attn_implementation(switches.attention)
        use_kernels(base, switches.kernels)
        switches.prepare(model, recipe.train)
        features = None
        if not self._encodes:
            features = way.subject.dtype(recipe)
            remove_vision_tower(base)
        tokenizer = _byte_tokenizer(folder)
        trainer_class: type[QwenVLTrainer] = QwenVLTrainer
        collator = BenchCollator(self.lengths, self.config, tokenizer, features)
        if self.padded_to is not None:
            multiply_as_peft(model)
            trainer_class = PublishedTrainer
            collator = PaddedCollator(self.lengths, self.config, tokenizer, padded_to=self.padded_to)
        trainer = trainer_class(
            model,
            sft_config(given, output=str(folder), seed=recipe.seed),
            collators={"train": collator},  # type: ignore[dict-item]  # it takes the place of `collate.Collator`
            indices={"train": range(len(self.lengths))},
            run=RunFolder(folder),
            tokens_per_batch=self.budget,
            learning_rates=recipe.train.learning_rates.model_dump(),
            vision_layer_decay=recipe.train.vision_layer_decay,
            loraplus_lr_ratio=recipe.train.loraplus_lr_ratio,
            shuffle=False,
            callbacks=[self.meter],
        )
        drop_own_printers(trainer)
        return trainer


def _fitting(work: Callable[[], T]) -> T | OutOfMemory:
    """As `batches.attempt.attempt`, also for the trainer's DoesNotFit."""
    try:
        return attempt(work)
    except DoesNotFit as error:
        said = str(error).rpartition("\n")[2].strip("()")
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return OutOfMemory(said)


def _with_batch(recipe: Recipe, batch: int) -> Recipe:
    step = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": SAMPLES // batch}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=step)})


def _checked(lengths: Sequence[Lengths]) -> Checked:
    """The samples as `checking.look_at` would describe them."""
    tokens, supervised, images = (np.array(column, dtype=np.int64) for column in zip(*lengths, strict=True))
    numbers = np.arange(len(lengths))
    return Checked(
        kept=numbers,
        lengths=tokens,
        images=images,
        supervised=supervised,
        source=np.zeros_like(numbers),
        weights=[1.0],
        problems=[],
        refused=0,
        dropped_long=[],
        shortened=[],
    )


def _described(switches: Switches, budget: int | None, batch: int) -> dict[str, Any]:
    """What was settled, for the row's `switches`."""
    return {
        "attention": switches.attention,
        "kernels": switches.kernels,
        "checkpointing": switches.checkpointing,
        "optim": switches.optim,
        "vision_cache": switches.vision_cache,
        "tokens_per_batch": budget,
        "per_device_train_batch_size": batch,
        "reasons": list(switches.reasons),
    }


def _byte_tokenizer(folder: Path) -> QwenVLTokenizer:
    """A tokenizer of single bytes: TRL requires one, though nothing is tokenised."""
    file = folder / "qwen.tiktoken"
    file.write_text("".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)))
    return QwenVLTokenizer(str(file))
