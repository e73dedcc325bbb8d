"""Bytes that a step allocates: forward, loss and backward are run on the meta device, with a few layers only.

The model's own code and the trainer's own loss are run, so what autograd, recomputation and PEFT keep is counted as
they keep it. All layers but the first are alike, so the bytes of any depth follow from those of two and three layers.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune.memory.kernels import fused_shapes, kernels_of, own_bytes
from finetune.memory.live_bytes import META, LiveBytes, Moment
from finetune.memory.workload import Workload
from finetune.model.adapters import TrainableModel, trains_vision, without_adapter
from finetune.model.masters import rounded_masters
from finetune.model.recomputation import Recomputation, set_recomputation
from finetune.model.step_loss import forward_with_loss
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from qwenvl.text.chat import IGNORED

FEWEST = 2
"""Layers that are run. The first is unlike the others: its input may need no gradient."""

# Stages of a step; bytes are counted under the stage that allocated them.
VISION, LANGUAGE, LOSS, BACKWARD, VISION_BACKWARD = "vision", "language", "loss", "backward", "vision backward"


@dataclass(frozen=True)
class Step:
    """One forward, with its backward if there is one.

    Attributes:
        fullest: of each stage, the moment at which most bytes are held.
        host: bytes that are moved to host memory.
    """

    fullest: dict[str, Moment]
    host: int = 0

    def peak(self, *stages: str) -> Moment:
        """The fullest moment of these stages, or of all stages."""
        moments = [self.fullest[stage] for stage in stages or self.fullest if stage in self.fullest]
        return max(moments, key=lambda moment: moment.total, default=Moment())


def step_of_shapes(
    model: TrainableModel,
    workload: Workload,
    checkpointing: Recomputation | None,
    device_type: str,
    *,
    kernels: str = "torch",
    features: bool = False,
    input_gradient: bool = False,
    rounds_to: torch.dtype | None = None,
) -> Step:
    """Count a step of a model on the meta device, of any depth. Gradients of an earlier forward are there already.

    Args:
        model: as it is trained (`weights.model_of_shapes`).
        checkpointing: None is a forward without gradients, in eval mode.
        device_type: see `count_step`.
        kernels: torch or liger.
        features: images come as features that were encoded before.
        input_gradient, rounds_to: see `count_step`.
    """
    config = without_adapter(model).config
    batch = batch_of_shapes(config, workload, features)

    def run(layers: dict[str, int]) -> Step:
        with _only(model, layers), fused_shapes(model, kernels):
            return count_step(
                model, batch, checkpointing, device_type, input_gradient=input_gradient, rounds_to=rounds_to
            )

    return _of_all_layers(config, run, trains_vision=checkpointing is not None and trains_vision(model))


def count_step(
    model: TrainableModel,
    batch: dict[str, Any],
    checkpointing: Recomputation | None,
    device_type: str,
    *,
    input_gradient: bool = False,
    rounds_to: torch.dtype | None = None,
) -> Step:
    """Run a step and count its bytes, with real tensors or on the meta device; gradients are allocated before it.

    Args:
        batch: as the collator makes it.
        checkpointing: None runs a forward without gradients, in eval mode.
        device_type: cuda or cpu: whose kernels the meta device stands for.
        input_gradient: the embeddings' output requires gradients though nothing needs them, as with TRL's
            `gradient_checkpointing`.
        rounds_to: of float32 masters, whose rounded copies are there before the step; see `masters.rounded_masters`.
    """
    base = without_adapter(model)
    trains = checkpointing is not None
    model.train(trains)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    counted, host = LiveBytes(own_bytes(device_type)), _HostMemory()
    counted.stage = LANGUAGE
    set_recomputation(model, checkpointing or "none", lambda: host.hooks(counted))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_stages(base, counted, input_gradient and trains))
        stack.enter_context(kernels_of(device_type))
        stack.enter_context(torch.set_grad_enabled(trains))
        stack.enter_context(rounded_masters(model, rounds_to))
        stack.enter_context(counted)
        loss = forward_with_loss(model, model, batch, items=1).loss
        if loss.requires_grad:  # not if only the vision side is trained and the batch is text
            counted.stage = BACKWARD
            torch.autograd.backward([loss])
    return Step(counted.fullest, host.bytes)


class _HostMemory:
    """Stands for host memory in offloading: the meta device and the CPU have no other memory."""

    def __init__(self) -> None:
        self.bytes = 0

    def hooks(self, counted: LiveBytes) -> torch.autograd.graph.saved_tensors_hooks:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            moved = tensor.clone()
            counted.leave_out(moved)
            self.bytes += moved.nbytes
            return moved

        return torch.autograd.graph.saved_tensors_hooks(pack, torch.clone)


@contextlib.contextmanager
def _stages(base: QwenVLForConditionalGeneration, counted: LiveBytes, input_gradient: bool) -> Iterator[None]:
    """Inside, set `counted.stage` as the model's forward and backward go on."""

    def enter(stage: str) -> None:
        counted.stage = stage

    def after_vision(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        enter(LANGUAGE)
        if output.requires_grad:
            output.register_hook(lambda gradient: enter(VISION_BACKWARD))

    handles = [base.transformer.register_forward_hook(lambda *_: enter(LOSS))]
    if base.config.visual is not None:
        visual = base.transformer.visual
        handles += [
            visual.register_forward_pre_hook(lambda *_: enter(VISION)),
            visual.register_forward_hook(after_vision),
        ]
    if input_gradient:
        handles.append(base.transformer.wte.register_forward_hook(lambda *given: given[-1].requires_grad_(True)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batch_of_shapes(config: QwenVLConfig, workload: Workload, features: bool = False) -> dict[str, Any]:
    """A pack of this size: ids, positions and labels are real, pixels and features are on the meta device.

    Raises:
        ValueError: more image tokens, trained tokens or sequences than tokens.
    """
    tokens, images = workload.tokens, workload.images
    span = config.n_queries + 2
    if not 0 <= workload.supervised < tokens or images * span > tokens or workload.sequences > tokens:
        raise ValueError(f"no such forward: {workload}, {span} tokens an image")
    lengths = sequence_lengths(workload)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    if images:
        image_ids = torch.tensor([config.image_start_id, *[config.image_token_id] * (span - 2), config.image_end_id])
        ids[0, : images * span] = image_ids.repeat(images)
    labels = torch.full_like(ids, IGNORED)
    labels[0, tokens - workload.supervised :] = 0
    batch = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "sequence_lengths": torch.tensor(lengths),
    }
    if images and not features:
        assert config.visual is not None, "a model without a vision side takes no images"
        side = config.visual["image_size"]
        batch["pixel_values"] = torch.empty(images, 3, side, side, dtype=torch.uint8, device=META)
    elif images:
        batch["image_features"] = torch.empty(
            images, config.n_queries, config.hidden_size, dtype=torch.bfloat16, device=META
        )
    return batch


def sequence_lengths(workload: Workload) -> list[int]:
    """Tokens of each sequence: the longest first, the others of equal length."""
    others = workload.sequences - 1
    if not others:
        return [workload.tokens]
    longest = min(workload.sequence_length, workload.tokens - others)
    rest = workload.tokens - longest
    return [longest, *(rest // others + (number < rest % others) for number in range(others))]


def _of_all_layers(config: QwenVLConfig, run: Callable[[dict[str, int]], Step], *, trains_vision: bool) -> Step:
    """Extrapolate a step of the whole model from steps of `FEWEST` layers and of one more."""
    depths = {LANGUAGE: config.num_hidden_layers, VISION: config.visual["layers"] if config.visual else 0}
    few = {part: min(depth, FEWEST) for part, depth in depths.items()}
    step = shallow = run(few)
    for part, depth in depths.items():
        # The vision transformer keeps nothing per layer unless something in it is trained.
        if depth > few[part] and (part == LANGUAGE or trains_vision):
            more = run(few | {part: few[part] + 1})
            step = _add_depth(step, shallow, more, depth - few[part])
    return step


def _add_depth(step: Step, shallow: Step, more: Step, layers: int) -> Step:
    """Add `layers` times the difference between `more`, which has one layer more, and `shallow`."""
    fullest = {}
    for stage, moment in step.fullest.items():
        less, one_more = shallow.fullest[stage], more.fullest[stage]
        parts = moment.held.keys() | less.held.keys() | one_more.held.keys()
        held = {part: moment.held[part] + layers * (one_more.held[part] - less.held[part]) for part in parts}
        fullest[stage] = Moment(Counter(held), moment.total + layers * (one_more.total - less.total))
    return Step(fullest, step.host + layers * (more.host - shallow.host))


@contextlib.contextmanager
def _only(model: nn.Module, layers: dict[str, int]) -> Iterator[None]:
    """Inside, cut the model down to its first layers, as many as `layers` says for each part."""
    lists: list[tuple[nn.Module, str, nn.ModuleList]] = []
    for module in model.modules():
        for name, part in (("h", LANGUAGE), ("resblocks", VISION)):
            blocks = module._modules.get(name)
            if isinstance(blocks, nn.ModuleList):
                lists.append((module, name, blocks))
                module._modules[name] = blocks[: layers[part]]
    try:
        yield
    finally:
        for module, name, blocks in lists:
            module._modules[name] = blocks
