"""How far full training in 16 bits moves the weights as float32 does: ways of keeping small updates, side by side.

    python examples/mixed_precision.py
    python examples/mixed_precision.py --steps 30 --only "float32" "bfloat16, masters"

Trains the bundled nano checkpoint, all of it, on the quickstart's boarding passes, with each way from the same weights
and on the same batches. Printed are, of the weights that a way goes on training with, the cosine of their change to
that of float32 and its relative length; the share of weights that differ in the 16-bit model; and seconds a step. It
takes some minutes; float16 is slow on most CPUs.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from finetune.model import adapters
from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training.train import train
from finetune.training.trainer import QwenVLTrainer

BASE = Path("examples/nano")
SETTINGS = (
    *("adapter=null", "freeze.language=false", "freeze.resampler=false", "freeze.vision=false"),
    *(
        "data.vision_cache=off",
        "evaluate=null",
        "data.train=[{path: examples/quickstart/boarding/train.jsonl, format: messages}]",
    ),
    *("train.learning_rate=1e-5", "train.lr_scheduler_type=constant", "train.warmup_steps=0"),
    *("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2", "train.save_steps=1000"),
)


class AdamW16(torch.optim.Optimizer):
    """Adam over 16-bit weights, with moments in float32 and one of two ways to keep what rounding takes.

    Args:
        kahan: keep what was rounded off in a second 16-bit value of each weight, and add it to the next update
            (Kahan summation); else round up or down at random, with the mean of the exact value (stochastic rounding;
            arXiv 2010.06192 compares the two).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, *, kahan: bool) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})
        self.kahan = kahan

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures: the trainer gives none
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = 0
                    state["mean"] = torch.zeros_like(weight, dtype=torch.float32)
                    state["square"] = torch.zeros_like(state["mean"])
                    state["lost"] = torch.zeros_like(weight)
                state["step"] += 1
                gradient, (beta1, beta2) = weight.grad.float(), group["betas"]
                state["mean"].lerp_(gradient, 1 - beta1)
                state["square"].lerp_(gradient.square(), 1 - beta2)
                mean = state["mean"] / (1 - beta1 ** state["step"])
                root = (state["square"] / (1 - beta2 ** state["step"])).sqrt()
                exact = weight.float() + state["lost"].float() - group["lr"] * mean / (root + group["eps"])
                if self.kahan:
                    weight.copy_(exact)
                    state["lost"].copy_(exact - weight.float())
                else:
                    weight.copy_(_rounded_at_random(exact))


def _rounded_at_random(exact: torch.Tensor) -> torch.Tensor:
    """A random number below the last bit of bfloat16 is added, and the bits after it are cut off."""
    bits = exact.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & ~0xFFFF).view(torch.float32)


@dataclass(frozen=True)
class Way:
    """A way to train: its dtype, what is taken out of the toolkit for it, and the optimizer if it is not AdamW."""

    name: str
    dtype: str
    masters: bool = True
    autocast: bool = False
    kahan: bool | None = None


WAYS = (
    Way("float32", "float32"),
    Way("bfloat16 alone", "bfloat16", masters=False),
    Way("bfloat16 alone, stochastic rounding", "bfloat16", masters=False, kahan=False),
    Way("bfloat16 alone, Kahan summation", "bfloat16", masters=False, kahan=True),
    Way("bfloat16, masters and autocast", "bfloat16", autocast=True),
    Way("bfloat16, masters", "bfloat16"),
    Way("float16, masters", "float16"),
)
"""The last two are what the toolkit does."""


@contextlib.contextmanager
def as_in(way: Way) -> Iterator[None]:
    """Inside, the toolkit trains in this way."""
    with contextlib.ExitStack() as stack:
        if not way.masters:
            stack.enter_context(mock.patch.object(adapters, "make_masters", lambda model: None))
        if way.autocast:
            stack.enter_context(mock.patch.object(QwenVLTrainer, "computing", contextlib.nullcontext))
            by_accelerate = Trainer._build_accelerator_args
            stack.enter_context(mock.patch.object(QwenVLTrainer, "_build_accelerator_args", by_accelerate))
        yield


@dataclass(frozen=True)
class Trained:
    """The weights that a way goes on with, those of its 16-bit model, and seconds of a step."""

    weights: dict[str, torch.Tensor]
    model: dict[str, torch.Tensor]
    seconds: float


def train_in(way: Way, steps: int, folder: Path) -> Trained:
    """Train in this way."""
    overrides = [*SETTINGS, f"model.dtype={way.dtype}", f"train.max_steps={steps}", f"output={folder}"]
    recipe = load_recipe(Path("recipes/quickstart.yaml"), overrides)
    made: list[tuple[nn.Module, AdamW16]] = []

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        trained = [one for one in model.parameters() if one.requires_grad]
        made.append((model, AdamW16(trained, recipe.train.learning_rate, kahan=bool(way.kahan))))
        return made[0][1]

    own: Callable[[nn.Module], torch.optim.Optimizer] | None = None if way.kahan is None else optimizer
    with as_in(way), contextlib.redirect_stdout(sys.stderr):  # the table is printed alone
        run = train(recipe, say_nothing, optimizer=own)
    weights = load_file(run / "checkpoints" / f"step-{steps}" / "model.safetensors")
    if way.kahan:
        (model, kept), *_ = made
        weights |= {name: one.detach() + kept.state[one]["lost"].float() for name, one in model.named_parameters()}
    phases = json.loads((run / "run.json").read_text())["phases"]
    seconds = phases["forward_backward"]["seconds"] + phases["optimizer"]["seconds"]
    return Trained(weights, load_file(run / "model" / "model.safetensors"), seconds / steps)


def change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> torch.Tensor:
    """The change of all weights, as one vector."""
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in sorted(before)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=[way.name for way in WAYS], help="besides float32")
    given = parser.parse_args()
    before = load_file(BASE / "model.safetensors")
    print("| way | cosine to float32 | length | 16-bit weights changed | seconds a step |")
    print("| --- | ---: | ---: | ---: | ---: |")
    reference = None
    for way in WAYS:
        if given.only and way.name not in ("float32", *given.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            trained = train_in(way, given.steps, Path(folder) / "run")
        update = change(before, trained.weights)
        reference = update if reference is None else reference
        cosine = (update @ reference / update.norm() / reference.norm()).item()
        length = (update.norm() / reference.norm()).item()
        changed = (change(before, {name: one.bfloat16() for name, one in trained.model.items()}) != 0).double().mean()
        print(f"| {way.name} | {cosine:.3f} | {length:.3f} | {changed:.1%} | {trained.seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
