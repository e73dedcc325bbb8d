"""How the next token is chosen from logits: the likeliest, or drawn; and how likely it was."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

LIKELY = 1024
"""So many likeliest tokens are looked at first where `top_p` cuts: they have nearly all of the probability."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one reply are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above 0 tokens are drawn.
        top_p: of the likeliest tokens that together have this probability.
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
    """
    chosen: list[int] = logits.argmax(-1).tolist()
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0:
            chosen[row] = draw(logits[row], sampling, draws[row].random())
    return chosen


def draw(logits: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    """The token at which the tokens' summed probability passes a number from 0 to 1.

    Args:
        logits: (vocabulary,)
    """
    scaled = logits.double() / sampling.temperature
    if sampling.top_p >= 1:
        ids, probabilities = None, scaled.softmax(-1)
    else:
        ids, probabilities = _likeliest(scaled.softmax(-1), sampling.top_p)
    sums = probabilities.cumsum(-1)
    # Rounding must not lead past the end, nor to a token without probability.
    target = min(uniform * float(sums[-1]), float(sums[-1]) * (1 - 1e-12))
    place = int(torch.searchsorted(sums, torch.tensor([target], device=sums.device, dtype=sums.dtype), right=True))
    return place if ids is None else int(ids[place])


def _likeliest(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest likeliest tokens that together have `top_p`, and their probabilities, likeliest first."""
    for count in (LIKELY, len(probabilities)):
        most, ids = probabilities.topk(min(count, len(probabilities)))
        sums = most.cumsum(-1)
        if count >= len(probabilities) or float(sums[-1]) >= top_p:
            break
    kept = int((sums < top_p).sum()) + 1
    return ids[:kept], most[:kept]
