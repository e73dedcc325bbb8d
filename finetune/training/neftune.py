"""NEFTune: uniform noise on the embeddings in training (Jain et al., 2023, arXiv:2310.05914).

Transformers' hook divides by the length of the whole row. In a row of several packed conversations that weakens the
noise by the square root of their number, so that it would depend on what a conversation was packed with.
"""

from math import sqrt
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.model.adapters import without_adapter


class NoisyEmbeddings(TrainerCallback):
    """Adds noise to the embeddings while a model trains, of the strength that each conversation has by itself.

    Image features, which take the place of embeddings, have none, as in Transformers' implementation.

    Args:
        alpha: the noise is uniform in +-alpha / sqrt(length x width), length in tokens of the conversation.
    """

    def __init__(self, alpha: float):
        self.alpha = alpha
        self._lengths: list[int] = []  # of the sequences of the current forward, tokens
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = without_adapter(kwargs["model"])
        self._handles = [
            model.register_forward_pre_hook(self._note_lengths, with_kwargs=True),
            model.get_input_embeddings().register_forward_hook(self._add_noise),
        ]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note_lengths(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._lengths = list(kwargs["sequence_lengths"]) if module.training else []

    def _add_noise(self, module: nn.Module, args: tuple[Any, ...], embedded: torch.Tensor) -> torch.Tensor | None:
        """Add noise to (1, tokens, width) embeddings of the packed sequences."""
        if not module.training:
            return None
        assert sum(self._lengths) == embedded.shape[-2], "the sequences of a pack make up its row"
        width = embedded.shape[-1]
        each = torch.tensor([self.alpha / sqrt(length * width) for length in self._lengths], device=embedded.device)
        strength = each.repeat_interleave(torch.tensor(self._lengths, device=embedded.device))[:, None]
        noise = torch.empty(embedded.shape, dtype=torch.float32, device=embedded.device).uniform_(-1, 1)
        return embedded + (noise * strength).to(embedded.dtype)
