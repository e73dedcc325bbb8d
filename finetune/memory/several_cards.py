"""How many of which cards a run fits whose model they share."""

from finetune.memory.auto_switches import choose_switches
from finetune.memory.free_memory import CARDS
from finetune.memory.plan import plan_memory
from finetune.memory.sharding import Sharding
from finetune.memory.switches import Switches
from finetune.memory.workload import Workload
from finetune.recipe import Recipe
from qwenvl import QwenVLConfig

COUNTS = (1, 2, 4, 8, 16)


def fewest_cards(recipe: Recipe, config: QwenVLConfig, workload: Workload, way: str = "fsdp") -> dict[int, int]:
    """The fewest cards of each usual size that a run fits; sizes of which `COUNTS` are too few are left out.

    Args:
        workload: the largest forward on a card.
        way: how they share the model (`sharding.WAYS`).

    Returns:
        GB of a card -> cards.
    """
    peaks: dict[tuple[Switches, int], int] = {}

    def fits(usable: int, count: int) -> bool:
        sharding = Sharding(way, count) if count > 1 else None
        switches = choose_switches(recipe, config, workload, usable, device_type="cuda", sharding=sharding)
        if (switches, count) not in peaks:
            plan = plan_memory(recipe, config, workload, switches=switches, sharding=sharding)
            peaks[switches, count] = plan.peak
        return peaks[switches, count] <= usable

    fewest = {size: next((count for count in COUNTS if fits(usable, count)), None) for size, usable in CARDS.items()}
    return {size: count for size, count in fewest.items() if count is not None}


def describe_several(fewest: dict[int, int]) -> str:
    """In words; sizes that need as many cards as a smaller one are left out.

    Args:
        fewest: GB of a card -> cards.
    """
    shown: list[str] = []
    least = max(COUNTS) + 1
    for size, count in sorted(fewest.items()):
        if count < least:
            shown.append(f"{count} x {size} GB")
            least = count
    if not shown:
        return f"fits no {max(COUNTS)} GPUs of up to {max(CARDS)} GB that share the model"
    *others, last = shown
    return f"fits {', '.join(others)} or {last}" if others else f"fits {last}"
