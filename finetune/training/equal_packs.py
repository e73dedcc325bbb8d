"""The same forwards on every process, where processes share the model.

Under FSDP2 and ZeRO-3 each forward and backward gathers the parameters of every layer from all processes: a process
that runs fewer packs than another, or leaves the vision side out where another runs it, makes that one wait forever.
So the packs of a batch are made alike before any of them runs: processes with fewer get empty packs, and a pack of
text whose counterpart elsewhere has images gets a blank image in a sequence of its own. Nothing in them is supervised,
and sequences of a pack do not see each other, so loss and gradients are unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from finetune.batches.collate import NO_SAMPLE
from finetune.batches.images import CACHED, FEATURES, PIXELS
from qwenvl import QwenVLConfig
from qwenvl.text.chat import IGNORED


@dataclass(frozen=True)
class Fillers:
    """What packs are made alike with.

    Attributes:
        token: the id of a sequence of one token.
        image: the ids of a sequence that is one image.
        pixels: (1, 3, S, S), uint8, a blank image.
    """

    token: int
    image: tuple[int, ...]
    pixels: torch.Tensor

    @classmethod
    def of(cls, config: QwenVLConfig, token: int) -> "Fillers":
        """For a model; of a text-only checkpoint, `image` is empty.

        Args:
            token: the id of a sequence of one token.
        """
        if config.visual is None:
            return cls(token, (), torch.empty(0, 3, 0, 0, dtype=torch.uint8))
        assert config.image_start_id is not None and config.image_end_id is not None
        assert config.image_token_id is not None
        ids = (config.image_start_id, *[config.image_token_id] * config.n_queries, config.image_end_id)
        size = config.visual["image_size"]
        return cls(token, ids, torch.zeros(1, 3, size, size, dtype=torch.uint8))

    def empty_pack(self, device: torch.device) -> dict[str, Any]:
        """A pack of one sequence of one token, of no sample and not trained."""
        return {
            "input_ids": torch.tensor([[self.token]], device=device),
            "labels": torch.tensor([[IGNORED]], device=device),
            "position_ids": torch.tensor([[0]], device=device),
            "sequence_lengths": torch.tensor([1], device=device),
            "sequence_images": torch.tensor([0], device=device),
            "samples": torch.tensor([NO_SAMPLE], device=device),
        }

    def with_blank_image(self, pack: dict[str, Any]) -> dict[str, Any]:
        """A pack with a sequence more, of no sample and not trained, that is one blank image to encode."""
        length = len(self.image)
        added: dict[str, Any] = {
            "input_ids": [list(self.image)],
            "labels": [[IGNORED] * length],
            "position_ids": [list(range(length))],
            "sequence_lengths": [length],
            "sequence_images": [1],
            "samples": [NO_SAMPLE],
        }
        longer = {
            name: torch.cat([pack[name], torch.tensor(values, device=pack[name].device)], dim=-1)
            for name, values in added.items()
        }
        device = pack["input_ids"].device
        longer[PIXELS] = self.pixels.to(device)
        if FEATURES in pack:
            longer[FEATURES] = pack[FEATURES]
            longer[CACHED] = torch.tensor([True] * len(pack[FEATURES]) + [False], device=device)
        return pack | longer


def equalize(packs: Sequence[dict[str, Any]], fillers: Fillers, device: torch.device) -> list[dict[str, Any]]:
    """Make the packs that this process runs next alike on all processes; a collective call.

    Args:
        packs: as `packing.split_batch` gives them; may be empty.
        device: of the process group's tensors, and of packs that are added.

    Returns:
        As many packs as the process with the most has, in the same order, each with an image to encode where any
        process has one there.
    """
    packs = list(packs)
    number = torch.tensor(len(packs), device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    packs += [fillers.empty_pack(device) for _ in range(int(number) - len(packs))]
    if not fillers.image or not packs:
        return packs
    encodes = torch.tensor([PIXELS in pack for pack in packs], dtype=torch.uint8, device=device)
    dist.all_reduce(encodes, op=dist.ReduceOp.MAX)
    return [
        fillers.with_blank_image(pack) if somewhere and PIXELS not in pack else pack
        for pack, somewhere in zip(packs, encodes.tolist(), strict=True)
    ]
