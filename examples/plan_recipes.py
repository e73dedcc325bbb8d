"""Plan the memory of every shipped recipe, phase by phase, and print the table that recipes/README.md has.

    python examples/plan_recipes.py
    python examples/plan_recipes.py docvqa_qlora_8gb docvqa_qlora_6gb --card 8 data.tokens_per_batch=4096

Planned is for the published sizes, from the recipe alone: no weights, no network, no GPU. A recipe is planned for the
smallest usual card that it fits, or for those that it is made for; a recipe that leaves a choice to the card (`auto`)
makes it as it would there. `--card` takes another, whether it fits or not.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import GenerationConfig

from finetune.batches.budget import packing_budget
from finetune.data.checking import Checked
from finetune.memory.auto_budget import auto_budget
from finetune.memory.auto_switches import choose_switches
from finetune.memory.free_memory import CARDS, CONTEXT
from finetune.memory.plan import MemoryPlan, plan_memory
from finetune.memory.switches import Switches
from finetune.memory.weights import settle_embeddings
from finetune.memory.workload import worst_workload
from finetune.recipe import Recipe, RecipeError, load_recipe
from qwenvl import QwenVLConfig

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

CHAT_FORMATS = {"Qwen/Qwen-VL": "raw", "Qwen/Qwen-VL-Chat": "chatml"}
"""What the generation configs of the published checkpoints say, by which embeddings are trained or not."""

MADE_FOR = {
    "docvqa_qlora": (16, 24),
    "docvqa_qlora_8gb": (8,),
    "docvqa_qlora_6gb": (6,),
    "docvqa_lora_24gb": (24,),
}
"""Cards in GB; of other recipes the smallest that fits."""

SETTLED = ("model.attention=varlen", "model.kernels=torch")
"""What hangs on the machine that a recipe runs on, as cards since 2020 have it with what PyTorch brings."""

PHASES = ("load", "encode", "train", "evaluate", "save")


@dataclass(frozen=True)
class Conversation:
    """What a row of a recipe's data takes, in tokens: `supervised` of them are trained."""

    tokens: int
    supervised: int
    images: int


QUESTION = Conversation(320, 12, 1)  # 258 of the image, turns and question; the answer is a few words
CHAT = Conversation(2048, 512, 4)  # as long as the recipe allows
CONVERSATIONS = {"chat_lora": CHAT, "base_lora": CHAT, "full_sft": CHAT}
"""By recipe; the others ask questions about an image."""


@dataclass(frozen=True)
class Row:
    """A recipe on a card: what is planned and what was chosen."""

    name: str
    card: int | None
    plan: MemoryPlan
    switches: Switches

    def cells(self) -> list[str]:
        """Of the table: memory in GB, one decimal."""
        needed = {phase.name: phase.needed for phase in self.plan.phases}
        card = "none of them" if self.card is None else f"{self.card} GB"
        forward = f"{self.plan.workload.tokens:,}"
        memory = [f"{needed[phase] / 1e9:.1f}" if phase in needed else "" for phase in PHASES]
        host = f"{self.plan.host / 1e9:.1f}"
        return [f"[{self.name}]({self.name}.yaml)", card, forward, self.switches.checkpointing, *memory, host]


HEAD = ("recipe", "card", "tokens", "checkpointing", *PHASES, "host")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="by name (default: all), or key.path=value")
    parser.add_argument("--card", type=int, choices=tuple(CARDS), help="size of the card, GB")
    given = parser.parse_intermixed_args()
    overrides = [name for name in given.names if "=" in name]
    names = [name for name in given.names if "=" not in name] or recipe_names()
    if unknown := set(names) - set(recipe_names()):
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(recipe_names())}")
    try:
        print("\n".join(table(names, overrides, None if given.card is None else (given.card,))))
    except RecipeError as error:
        parser.error(str(error))
    return 0


def recipe_names() -> list[str]:
    """All that start from a published checkpoint."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml") if load_recipe(file).model.path in CHAT_FORMATS)


def table(
    names: Sequence[str] | None = None, overrides: Sequence[str] = (), cards: tuple[int, ...] | None = None
) -> list[str]:
    """The lines of a Markdown table of recipes, all by default; `cards` in GB in place of those they are made for."""
    rows = [HEAD, ("---",) * 4 + ("---:",) * (len(HEAD) - 4)]
    for name in recipe_names() if names is None else names:
        recipe = load_recipe(RECIPES / f"{name}.yaml", [*SETTLED, *overrides])
        rows += [row.cells() for row in rows_of(name, recipe, cards or MADE_FOR.get(name))]
    return [f"| {' | '.join(row)} |" for row in rows]


def rows_of(name: str, recipe: Recipe, cards: tuple[int, ...] | None) -> list[Row]:
    """A recipe on these cards, or on the smallest that it fits; where it fits none, on the largest, without a card."""
    config = QwenVLConfig()
    recipe = settle_embeddings(recipe, GenerationConfig(chat_format=CHAT_FORMATS[recipe.model.path]))
    conversation = CONVERSATIONS.get(name, QUESTION)
    if cards is not None:
        return [Row(name, card, *plan_on(recipe, config, conversation, card)) for card in cards]
    for card, usable in CARDS.items():
        plan, switches = plan_on(recipe, config, conversation, card)
        if plan.fits(usable):
            return [Row(name, card, plan, switches)]
    return [Row(name, None, plan, switches)]


def plan_on(
    recipe: Recipe, config: QwenVLConfig, conversation: Conversation, card: int
) -> tuple[MemoryPlan, Switches]:
    """What a run does and holds on a card of so many GB where nothing else is on it."""
    batch = recipe.train.per_device_train_batch_size
    data = alike(conversation, batch)
    if recipe.data.tokens_per_batch == "auto":
        budget = auto_budget(recipe, config, data, free=card * 1_000_000_000 - CONTEXT, device_type="cuda").tokens
    else:
        budget = packing_budget(recipe.data, data.lengths)
    workload = worst_workload(
        data.lengths.tolist(), data.supervised.tolist(), data.images.tolist(), budget=budget, batch=batch
    )
    switches = choose_switches(recipe, config, workload, CARDS[card], device_type="cuda")
    return plan_memory(recipe, config, workload, switches=switches), switches


def alike(conversation: Conversation, count: int) -> Checked:
    """So many of these, as a look at the data would find them."""
    return Checked(
        kept=np.arange(count),
        lengths=np.full(count, conversation.tokens),
        images=np.full(count, conversation.images),
        supervised=np.full(count, conversation.supervised),
        source=np.zeros(count, np.int64),
        weights=[1.0],
        problems=[],
        refused=0,
        dropped_long=[],
        shortened=[],
    )


if __name__ == "__main__":
    sys.exit(main())
