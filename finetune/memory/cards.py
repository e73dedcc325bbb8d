"""Usual cards, and how much of each a run can plan with."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.memory.plan import MemoryPlan

CONTEXT = 500_000_000
"""Bytes of a GPU that CUDA and its libraries take before anything is loaded."""

USABLE = 0.95
"""Share of what is left that a run can plan with; the rest is in pieces between others, too small for what comes."""

CARDS = {size: int((size * 1_000_000_000 - CONTEXT) * USABLE) for size in (6, 8, 12, 16, 24, 40, 48, 80)}
"""Usual cards by their size in GB, and the bytes of each that a run can plan with."""


def fitting_cards(plan: "MemoryPlan") -> list[int]:
    """Sizes in GB of the usual cards that a plan fits."""
    return [size for size, usable in CARDS.items() if plan.fits(usable)]


def describe_cards(plan: "MemoryPlan") -> str:
    """In words; what is planned for a CPU is a little other there."""
    fitting = fitting_cards(plan)
    return f"fits a GPU of {fitting[0]} GB or more" if fitting else f"fits no GPU of up to {max(CARDS)} GB"
