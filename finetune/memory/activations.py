"""Bytes that a step makes and holds: forward, loss and backward run on shapes alone, at a depth of a few layers.

What is run is the model's own code with the trainer's own loss, so that what autograd, checkpointing and PEFT keep is
counted as they keep it. Layers are alike: from a model of two layers and one of three follows one of any number.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from finetune.memory.kernels import fused_shapes, kernels_of, own_bytes
from finetune.memory.live_bytes import META, LiveBytes, Moment
from finetune.memory.workload import Workload
from finetune.model.adapters import trains_vision
from finetune.model.recomputation import Checkpointing, checkpoint_blocks
from finetune.model.step_loss import forward_with_loss
from qwenvl import QwenVLConfig
from qwenvl.text.chat import IGNORED

FEWEST = 2
"""Layers that are run of more. The first is unlike the others: what comes before it may need no gradient."""

# What a step consists of; bytes are counted under the stage in which they came into being.
VISION, LANGUAGE, LOSS, BACKWARD, VISION_BACKWARD = "vision", "language", "loss", "backward", "vision backward"


@dataclass(frozen=True)
class Step:
    """One forward, and its backward where there is one.

    Attributes:
        fullest: the fullest moment of each stage.
        host: bytes that went to host memory meanwhile.
    """

    fullest: dict[str, Moment]
    host: int = 0

    def peak(self, *stages: str) -> Moment:
        """The fullest moment of these stages, or of all."""
        moments = [self.fullest[stage] for stage in stages or self.fullest if stage in self.fullest]
        return max(moments, key=lambda moment: moment.total, default=Moment())


def step_of_shapes(
    model: nn.Module,
    workload: Workload,
    checkpointing: Checkpointing | None,
    device_type: str,
    *,
    kernels: str = "torch",
    features: bool = False,
    input_gradient: bool = False,
) -> Step:
    """A step of a model of shapes, whatever its depth; gradients are there from forwards before it.

    Args:
        model: as it is trained (`weights.model_of_shapes`).
        kernels: torch or liger.
        checkpointing: None is a forward without gradients, in eval mode.
        features: images come as features, encoded before.
        input_gradient: see `count_step`.
    """
    batch = batch_of_shapes(model.config, workload, features)

    def run(layers: dict[str, int]) -> Step:
        with _only(model, layers), fused_shapes(model, kernels):
            return count_step(model, batch, checkpointing, device_type, input_gradient=input_gradient)

    return _of_all_layers(model.config, run, trains_vision=checkpointing is not None and trains_vision(model))


def count_step(
    model: nn.Module,
    batch: dict[str, Any],
    checkpointing: Checkpointing | None,
    device_type: str,
    *,
    input_gradient: bool = False,
) -> Step:
    """Run a step and count its bytes, of a model of shapes or a real one. Gradients are there, as after a forward.

    Args:
        batch: as the collator makes it.
        checkpointing: None runs a forward without gradients, in eval mode.
        device_type: whose kernels compute on shapes.
        input_gradient: embeddings get a gradient that nobody reads, as TRL's `gradient_checkpointing` has it.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    trains = checkpointing is not None
    model.train(trains)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    counted, host = LiveBytes(own_bytes(device_type)), _HostMemory()
    counted.stage = LANGUAGE
    checkpoint_blocks(model, checkpointing or "none", lambda: host.hooks(counted))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_stages(base, counted, input_gradient and trains))
        stack.enter_context(kernels_of(device_type))
        stack.enter_context(torch.set_grad_enabled(trains))
        stack.enter_context(counted)
        loss = forward_with_loss(model, model, batch, items=1).loss
        if loss.requires_grad:  # it does not where the vision side alone is trained, on text
            counted.stage = BACKWARD
            torch.autograd.backward([loss])
    return Step(counted.fullest, host.bytes)


class _HostMemory:
    """Where offloaded tensors go: on shapes, and on a CPU, there is no other memory to move them to."""

    def __init__(self):
        self.bytes = 0

    def hooks(self, counted: LiveBytes) -> torch.autograd.graph.saved_tensors_hooks:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            there = tensor.clone()
            counted.leave_out(there)
            self.bytes += there.nbytes
            return there

        return torch.autograd.graph.saved_tensors_hooks(pack, torch.clone)


@contextlib.contextmanager
def _stages(base: nn.Module, counted: LiveBytes, input_gradient: bool) -> Iterator[None]:
    """Tell the count where a step stands."""

    def enter(stage: str):
        counted.stage = stage

    def after_vision(module, args, output):
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
    """A pack of this size: ids, positions and labels are real, pixels and features are shapes.

    Raises:
        ValueError: more image tokens, trained tokens or sequences than tokens.
    """
    tokens, images = workload.tokens, workload.images
    span = config.n_queries + 2
    if not 0 <= workload.supervised < tokens or images * span > tokens or workload.sequences > tokens:
        raise ValueError(f"no such forward: {workload}, {span} tokens an image")
    lengths = sequence_lengths(workload)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    for place in range(0, images * span, span):
        ids[0, place] = config.image_start_id
        ids[0, place + 1 : place + span - 1] = config.image_token_id
        ids[0, place + span - 1] = config.image_end_id
    labels = torch.full_like(ids, IGNORED)
    labels[0, tokens - workload.supervised :] = 0
    batch = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "sequence_lengths": torch.tensor(lengths),
    }
    if images and not features:
        side = config.visual["image_size"]
        batch["pixel_values"] = torch.empty(images, 3, side, side, dtype=torch.uint8, device=META)
    elif images:
        batch["image_features"] = torch.empty(
            images, config.n_queries, config.hidden_size, dtype=torch.bfloat16, device=META
        )
    return batch


def sequence_lengths(workload: Workload) -> list[int]:
    """The longest first, the others alike."""
    others = workload.sequences - 1
    if not others:
        return [workload.tokens]
    longest = min(workload.sequence_length, workload.tokens - others)
    rest = workload.tokens - longest
    return [longest, *(rest // others + (number < rest % others) for number in range(others))]


def _of_all_layers(config: QwenVLConfig, run: Callable[[dict[str, int]], Step], *, trains_vision: bool) -> Step:
    """A step of the whole model from steps of `FEWEST` layers and one more."""
    depths = {LANGUAGE: config.num_hidden_layers, VISION: config.visual["layers"] if config.visual else 0}
    few = {part: min(depth, FEWEST) for part, depth in depths.items()}
    step = shallow = run(few)
    for part, depth in depths.items():
        # What the vision transformer keeps grows with its layers only where something in it is trained.
        if depth > few[part] and (part == LANGUAGE or trains_vision):
            more = run(few | {part: few[part] + 1})
            step = _add_depth(step, shallow, more, depth - few[part])
    return step


def _add_depth(step: Step, shallow: Step, more: Step, layers: int) -> Step:
    """`step` with the difference that a layer makes, so many times."""
    fullest = {}
    for stage, moment in step.fullest.items():
        less, one_more = shallow.fullest[stage], more.fullest[stage]
        parts = moment.held.keys() | less.held.keys() | one_more.held.keys()
        held = {part: moment.held[part] + layers * (one_more.held[part] - less.held[part]) for part in parts}
        fullest[stage] = Moment(Counter(held), moment.total + layers * (one_more.total - less.total))
    return Step(fullest, step.host + layers * (more.host - shallow.host))


@contextlib.contextmanager
def _only(model: nn.Module, layers: dict[str, int]) -> Iterator[None]:
    """Inside, the model has the first so many layers."""
    lists = []
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
