"""How the next token is chosen from logits: the likeliest, or drawn; and how likely it was."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from finetune.errors import Failed

LIKELY = 1024
"""So many likeliest tokens are looked at first where `top_p` cuts: they have nearly all of the probability."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one reply are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above 0 tokens are drawn.
        top_p: of the likeliest tokens that together have this probability; 0 leaves the likeliest one.
        seed: of the draws; the same seed gives the same reply, whatever else is in the batch. None for any.
        logprobs: how many likeliest tokens to give with each token and their log-probabilities; 0 for the token's own
            alone; None for none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    def nth(self, index: int) -> "Sampling":
        """That of the nth of several replies to one prompt: each has a seed of its own, the first one this one."""
        if self.seed is None or index == 0:
            return self
        return replace(self, seed=random.Random(f"{self.seed}, {index}").getrandbits(63))


GREEDY = Sampling()


def choose(logits: torch.Tensor, samplings: Sequence[Sampling], draws: Sequence[random.Random]) -> list[int]:
    """The next token of each row.

    Args:
        logits: (rows, vocabulary); -inf for tokens that may not be.
        samplings: of the rows.
        draws: of the rows; one number is taken from each that is drawn.

    Raises:
        Failed: a row's logits are no numbers, so that any token would be as good.
    """
    best, likeliest = logits.max(-1)
    if not bool(best.isfinite().all()):
        raise Failed(
            "the model's logits are infinite or not a number, as where float16 is too small for it or its weights are "
            "damaged: load it in bfloat16 or float32 (--dtype)"
        )
    chosen: list[int] = likeliest.tolist()
    for cut in (False, True):
        rows = [n for n, one in enumerate(samplings) if one.temperature > 0 and (one.top_p < 1) == cut]
        if rows:
            own = [samplings[row] for row in rows]
            for row, token in zip(rows, draw(logits[rows], own, [draws[row].random() for row in rows]), strict=True):
                chosen[row] = token
    return chosen


def draw(logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int]:
    """Of each row the token at which the tokens' summed probability passes a number from 0 to 1.

    Args:
        logits: (rows, vocabulary)
        samplings: of the rows; `top_p` is 1 in all or in none.
    """
    # Double, so that sums of many small probabilities are right.
    temperatures = logits.new_tensor([one.temperature for one in samplings], dtype=torch.float64)
    logits = logits.double()
    # From the likeliest token down, as a logit by a tiny temperature is infinite, and 0 by it is 0.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]).softmax(-1)
    ids = None
    if samplings[0].top_p < 1:
        probabilities, ids = _likeliest(probabilities, temperatures.new_tensor([one.top_p for one in samplings]))
    sums = probabilities.cumsum(-1)
    # Rounding must not lead past the end, nor to a token without probability.
    part = temperatures.new_tensor(uniforms).clamp(max=1 - 1e-12)
    places = torch.searchsorted(sums, part[:, None] * sums[:, -1:], right=True)
    chosen: list[int] = (places if ids is None else ids.gather(1, places))[:, 0].tolist()
    return chosen


def _likeliest(probabilities: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest likeliest tokens of each row, at least one, that together have `top_p`: their probabilities, 0 behind
    them, and ids, the likeliest first."""
    vocabulary = probabilities.shape[-1]
    most, ids = probabilities.topk(min(LIKELY, vocabulary))
    if len(most[0]) < vocabulary and bool((most.sum(-1) < top_p).any()):
        most, ids = probabilities.sort(descending=True)
    behind = most.cumsum(-1) - most >= top_p[:, None]
    behind[:, 0] = False  # with a top_p of 0 it is the only one
    return most.masked_fill(behind, 0), ids
