"""One row of the bench: the trainer as a run has it, on batches of known lengths, and what it took."""

import base64
import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.bench.arithmetic import Trained
from finetune.bench.card_speed import Peak
from finetune.bench.flops import executed_flops, packs_of, published_flops, useful_flops
from finetune.bench.measure import StepMeter
from finetune.bench.published import PUBLISHED_ARGUMENTS, PUBLISHED_SWITCHES, PublishedTrainer
from finetune.bench.subject import Subject
from finetune.bench.table import PUBLISHED, SAMPLES, Row
from finetune.bench.workload import MIX, BenchCollator, Lengths, PaddedCollator, draw_lengths
from finetune.data.checking import Checked
from finetune.memory.auto_budget import choose_budget
from finetune.memory.auto_switches import choose_switches
from finetune.memory.free_memory import USABLE, free_device_memory
from finetune.memory.out_of_memory import DoesNotFit
from finetune.memory.plan import plan_memory
from finetune.memory.switches import Switches
from finetune.memory.workload import Workload
from finetune.model.computing import choose_computing
from finetune.model.recomputation import checkpoint_blocks
from finetune.quantities import format_bytes
from finetune.recipe import Recipe
from finetune.run.folder import RunFolder
from finetune.training.arguments import loader_settings, sft_config
from finetune.training.progress import drop_own_printers
from finetune.training.trainer import QwenVLTrainer
from finetune.vision_cache.phase import let_tower_go
from qwenvl import QwenVLConfig, QwenVLTokenizer
from qwenvl.model.kernels import use_kernels

BESIDE_THE_STEPS: dict[str, Any] = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "load_best_model_at_end": False,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}
"""Of `SFTConfig`: nothing is evaluated, saved or logged, and the learning rate stays."""


@dataclass(frozen=True)
class Way:
    """A way to train that is measured at several lengths.

    Attributes:
        weights: lora, qlora or full.
        settings: ours or published.
        recipe: says the rest; of the published settings that of `published.published_recipe`.
        subject: the model.
        device: where it trains.
        peak: what the device can do at most.
    """

    weights: str
    settings: str
    recipe: Recipe
    subject: Subject
    device: torch.device
    peak: Peak

    @property
    def batch(self) -> int:
        """Samples of one batch: the recipe's number where it divides those of a step, else all of a step."""
        if self.settings == PUBLISHED:
            return PUBLISHED_ARGUMENTS["per_device_train_batch_size"]
        wished = self.recipe.train.per_device_train_batch_size
        return wished if SAMPLES % wished == 0 else SAMPLES


def longest_sample(recipe: Recipe, config: QwenVLConfig) -> int:
    """Tokens that a sample of the mix has at most, and that the published settings pad it to: `data.max_length`, or
    the model's training context (2048, the published script's number) where that is less."""
    return min(recipe.data.max_length or config.seq_length, config.seq_length)


def run_row(way: Way, samples: str, *, warm_up: int, steps: int) -> Row:
    """Train a fresh model for some steps on samples of one kind, and measure them.

    Args:
        samples: see `workload.draw_lengths`.
        warm_up, steps: before the measured ones, and measured.

    Raises:
        UserError: `samples` are too short for an image, or the recipe's limit for the mix.
        ValueError: what is to be trained cannot be.
    """
    row = _Row(way, samples, StepMeter(way.device, warm_up=warm_up, steps=steps))
    return row.measured()


class _Row:
    """What a row is made of."""

    def __init__(self, way: Way, samples: str, meter: StepMeter):
        self.way, self.samples, self.meter = way, samples, meter
        self.is_published = way.settings == PUBLISHED
        self.config = way.subject.config
        self.recipe = way.subject.settled(_with_batch(way.recipe, way.batch))
        most = longest_sample(self.recipe, self.config)
        count = len(meter.all_steps) * SAMPLES
        self.lengths = draw_lengths(samples, count, self.config, most=most, seed=self.recipe.seed)
        self.padded_to = None
        if self.is_published:
            self.padded_to = most if samples == MIX else int(samples)
        self.budget = None if self.is_published else self._budget()
        self.switches = self._switches()

    def measured(self) -> Row:
        row = Row(self.way.weights, self.way.settings, self.samples, self.padded_to)
        plan = self._plan()
        if not self.is_published:
            row = replace(row, plan=plan, switches=_described(self.switches, self.budget, self.way.batch))
        if self.way.device.type == "cpu" and plan > (free := free_device_memory()):
            # The system would not refuse the memory, but end the process that takes it.
            return replace(row, note=f"not tried: it needs {format_bytes(plan)}, and {format_bytes(free)} are free")
        outcome = _fitting(self._train)
        if isinstance(outcome, OutOfMemory):
            return replace(row, note=f"out of memory ({outcome.said})")
        trained, budget = outcome
        note = ""
        if budget != self.budget:
            note = f"packs of up to {self.budget:,} tokens did not fit: up to {budget:,} from there on"
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
        """Whether the vision tower sees the images."""
        return self.switches.vision_cache == "off"

    def _executed(self, trained: Trained, packs: Sequence[Sequence[Lengths]]) -> int:
        if self.is_published:
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
        """Tokens of one forward, as a run of the recipe on such samples has it."""
        return choose_budget(self.recipe, self.config, _checked(self.lengths)).tokens

    def _samples_of(self, steps: range) -> list[Lengths]:
        return self.lengths[steps.start * SAMPLES : steps.stop * SAMPLES]

    def _workload(self, steps: range) -> Workload:
        """The fullest forward of these steps, in each respect."""
        lengths = self._samples_of(steps)
        if self.is_published:
            images = max(sample.images for sample in lengths)
            # It has logits at every position, as if every token were trained.
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
        if self.is_published:
            return replace(PUBLISHED_SWITCHES, device_type=kind)
        capacity = int(free_device_memory() * USABLE)
        workload = self._workload(self.meter.all_steps)
        switches = choose_switches(self.recipe, self.config, workload, capacity, device_type=kind)
        computing = choose_computing(self.recipe.model)
        return replace(switches, attention=computing.attention, kernels=computing.kernels)

    def _plan(self) -> int:
        """Bytes of the steps whose memory is measured, by the memory plan.

        The plan knows our loss and not the published one, of whose steps this is less than they take.
        """
        workload = self._workload(self.meter.counted_steps)
        return plan_memory(self.recipe, self.config, workload, switches=self.switches)["train"].total

    # --- training ----------------------------------------------------------------------------------------------------

    def _train(self) -> tuple[Trained, int | None]:
        """What was trained, and the packing budget at the end."""
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

    def _make_trainer(self, model: torch.nn.Module, folder: Path) -> QwenVLTrainer:
        way, recipe, switches = self.way, self.recipe, self.switches
        given = {
            **recipe.train_arguments(),
            **switches.train_arguments,
            **BESIDE_THE_STEPS,
            **loader_settings(0, SAMPLES // way.batch),
            "dataloader_prefetch_factor": None,
            "dataloader_persistent_workers": False,
            "max_steps": len(self.meter.all_steps),
            **(PUBLISHED_ARGUMENTS if self.is_published else {}),
        }
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.set_attn_implementation(switches.attention)
        use_kernels(base, switches.kernels)
        if recipe.train.checkpointing is not None:  # TRL's own keys are the trainer's to follow
            checkpoint_blocks(model, switches.checkpointing)
        features = None
        if not self._encodes:
            features = way.subject.dtype(recipe)
            let_tower_go(base)
        tokenizer = _byte_tokenizer(folder)
        if self.is_published:
            trainer_class = PublishedTrainer
            collator = PaddedCollator(self.lengths, self.config, tokenizer, padded_to=self.padded_to)
        else:
            trainer_class = QwenVLTrainer
            collator = BenchCollator(self.lengths, self.config, tokenizer, features)
        trainer = trainer_class(
            model,
            sft_config(given, output=str(folder), seed=recipe.seed),
            collators={"train": collator},
            indices={"train": range(len(self.lengths))},
            run=RunFolder(folder),
            tokens_per_batch=self.budget,
            learning_rates=recipe.train.learning_rates.model_dump(),
            vision_layer_decay=recipe.train.vision_layer_decay,
            shuffle=False,
            callbacks=[self.meter],
        )
        drop_own_printers(trainer)
        return trainer


def _fitting(work: Callable[[], Any]) -> Any | OutOfMemory:
    """As `out_of_memory.attempt`, also where the trainer has given up on a conversation by itself."""
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
    """The samples as a look at data would have found them."""
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
    """What was settled, for the reader."""
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
    """One of single bytes: TRL wants to see a tokenizer, and nothing is tokenised."""
    file = folder / "qwen.tiktoken"
    file.write_text("".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)))
    return QwenVLTokenizer(str(file))
