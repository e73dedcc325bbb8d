"""Floating point operations of the bench's optimizer steps: those that samples need, and those that are executed."""

from collections.abc import Sequence

from finetune.batches.packing import pack
from finetune.bench.arithmetic import Forward, Trained, causal_pairs, training_flops
from finetune.bench.workload import Lengths
from qwenvl import QwenVLConfig


def packs_of(lengths: Sequence[Lengths], budget: int | None, batch: int) -> list[list[Lengths]]:
    """The samples of each forward, as the trainer packs them batch by batch.

    Args:
        budget: tokens of one forward (`packing.pack`).
        batch: samples of one batch.
    """
    packs = []
    for start in range(0, len(lengths), batch):
        members = lengths[start : start + batch]
        packs += [[members[index] for index in one] for one in pack([sample.tokens for sample in members], budget)]
    return packs


def useful_flops(config: QwenVLConfig, trained: Trained, lengths: Sequence[Lengths], *, encodes: bool = True) -> int:
    """Operations that real tokens need: forward and backward, causal attention, logits at supervised positions.

    Args:
        encodes: whether the vision tower encodes the images; false with a vision cache.
    """
    return training_flops(config, trained, _causal(lengths, encodes))


def executed_flops(
    config: QwenVLConfig,
    trained: Trained,
    packs: Sequence[Sequence[Lengths]],
    *,
    attention: str,
    checkpointing: str,
    encodes: bool = True,
) -> int:
    """Operations that our settings execute: with attention to masked positions, and what is computed again.

    Args:
        packs: the samples of each forward.
        attention, checkpointing: see `switches.Switches`.
    """
    executed = 0
    for members in packs:
        forward = _causal(members, encodes)
        # With a mask all pairs are computed. Only causal kernels skip some, of one sequence or (varlen) of several.
        if attention == "eager" or (attention == "sdpa" and len(members) > 1):
            forward = Forward(forward.tokens, forward.tokens**2, forward.scored, forward.images)
        executed += training_flops(
            config,
            trained,
            forward,
            checkpointing=checkpointing != "none",
            keeps_attention=checkpointing == "selective",
            fused_attention=attention != "eager",
        )
    return executed


def published_flops(
    config: QwenVLConfig, trained: Trained, packs: Sequence[Sequence[Lengths]], *, padded_to: int
) -> int:
    """Operations that the published settings execute: on padding too, with all pairs, all logits and checkpointing."""
    executed = 0
    for members in packs:
        images = sum(sample.images for sample in members)
        forward = Forward(tokens=padded_to, pairs=padded_to**2, scored=padded_to, images=images)
        executed += training_flops(config, trained, forward, checkpointing=True)
    return executed


def _causal(lengths: Sequence[Lengths], encodes: bool) -> Forward:
    tokens = [sample.tokens for sample in lengths]
    return Forward(
        tokens=sum(tokens),
        pairs=causal_pairs(tokens),
        scored=sum(sample.supervised for sample in lengths),
        images=sum(sample.images for sample in lengths) if encodes else 0,
    )
