"""How the next token is chosen from logits: the likeliest, or drawn; and how likely it was."""

from dataclasses import dataclass


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


GREEDY = Sampling()
