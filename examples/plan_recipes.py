"""Plan the memory of every shipped recipe, phase by phase, and print the table of recipes/README.md.

    python examples/plan_recipes.py
    python examples/plan_recipes.py docvqa_qlora_8gb docvqa_qlora_6gb --card 8 data.tokens_per_batch=4096
    python examples/plan_recipes.py full_sft --shared fsdp

The plan is for the published model sizes and needs only the recipe: no weights, no network, no GPU. A recipe is
planned for the smallest common card that it fits, or for the cards that it is made for; settings that are `auto` are
chosen for that card. `--card` plans for another card, whether the recipe fits it or not. `--shared` plans for one and
for several cards that share the model.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import GenerationConfig

from finetune.batches.budget import packing_budget
from finetune.data.checks.checked import Checked
from finetune.errors import UserError
from finetune.memory.auto_budget import auto_budget
from finetune.memory.auto_switches import choose_switches
from finetune.memory.free_memory import CARDS, CONTEXT
from finetune.memory.plan import MemoryPlan, plan_memory
from finetune.memory.several_cards import COUNTS
from finetune.memory.sharding import WAYS, Sharding
from finetune.memory.switches import Switches
from finetune.memory.weights import settle_embeddings
from finetune.memory.workload import worst_workload
from finetune.recipe import Recipe, load_recipe
from qwenvl import QwenVLConfig

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

CHAT_FORMATS = {"Qwen/Qwen-VL": "raw", "Qwen/Qwen-VL-Chat": "chatml"}
"""From the generation configs of the published checkpoints; decides whether embeddings are trained."""

MADE_FOR = {
    "docvqa_qlora": (16, 24),
    "docvqa_qlora_8gb": (8,),
    "docvqa_qlora_6gb": (6,),
    "docvqa_lora_24gb": (24,),
}
"""Recipe -> cards in GB. Other recipes are planned for the smallest card that they fit."""

SETTLED = ("model.attention=varlen", "model.kernels=torch")
"""Settings that depend on the machine, as they are on cards since 2020 with PyTorch alone."""

PHASES = ("load", "encode", "train", "evaluate", "save")


@dataclass(frozen=True)
class Conversation:
    """The size of a row of a recipe's data: tokens, those of them that are trained, and images."""

    tokens: int
    supervised: int
    images: int


QUESTION = Conversation(320, 12, 1)  # an image (258 tokens), a question, and an answer of a few words
CHAT = Conversation(2048, 512, 4)  # as long as the recipe allows
CONVERSATIONS = {"chat_lora": CHAT, "base_lora": CHAT, "full_sft": CHAT}
"""Recipe -> the size of its rows. The others ask questions about an image."""


@dataclass(frozen=True)
class Row:
    """A recipe on a card (GB, None if it fits none): its memory plan, and the settings chosen for it."""

    name: str
    card: int | None
    plan: MemoryPlan
    switches: Switches

    def cells(self) -> list[str]:
        """The cells of the table; memory in GB."""
        card = "none of them" if self.card is None else f"{self.card} GB"
        forward = f"{self.plan.workload.tokens:,}"
        return [f"[{self.name}]({self.name}.yaml)", card, forward, self.switches.checkpointing, *cells_of(self.plan)]


def cells_of(plan: MemoryPlan) -> list[str]:
    """GB of each phase, and of host memory."""
    needed = {phase.name: phase.needed for phase in plan.phases}
    return [*(f"{needed[phase] / 1e9:.1f}" if phase in needed else "" for phase in PHASES), f"{plan.host / 1e9:.1f}"]


HEAD = ["recipe", "card", "tokens", "checkpointing", *PHASES, "host"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="by name (default: all), or key.path=value")
    parser.add_argument("--card", type=int, choices=tuple(CARDS), help="size of the card, GB")
    parser.add_argument("--shared", choices=WAYS, help="plan for cards that share the model in this way")
    given = parser.parse_intermixed_args()
    overrides = [name for name in given.names if "=" in name]
    names = [name for name in given.names if "=" not in name] or recipe_names()
    if unknown := set(names) - set(recipe_names()):
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(recipe_names())}")
    try:
        if given.shared is not None:
            print("\n".join(line for name in names for line in shared_table(name, given.shared, overrides)))
            return 0
        print("\n".join(table(names, overrides, None if given.card is None else (given.card,))))
    except UserError as error:
        parser.error(str(error))
    return 0


def recipe_names() -> list[str]:
    """The recipes that start from a published checkpoint."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml") if load_recipe(file).model.path in CHAT_FORMATS)


def table(
    names: Sequence[str] | None = None, overrides: Sequence[str] = (), cards: tuple[int, ...] | None = None
) -> list[str]:
    """The lines of a Markdown table.

    Args:
        names: recipes; all by default.
        overrides: `key.path=value`, for all of them.
        cards: in GB, instead of those that the recipes are made for.
    """
    rows = [HEAD, ["---"] * 4 + ["---:"] * (len(HEAD) - 4)]
    for name in recipe_names() if names is None else names:
        recipe = load_recipe(RECIPES / f"{name}.yaml", [*SETTLED, *overrides])
        rows += [row.cells() for row in rows_of(name, recipe, cards or MADE_FOR.get(name))]
    return [f"| {' | '.join(row)} |" for row in rows]


def shared_table(name: str, way: str, overrides: Sequence[str] = ()) -> list[str]:
    """The lines of a Markdown table: a recipe on one and on several cards that share the model, in GB for each.

    Args:
        way: see `finetune.memory.sharding`.
    """
    config = QwenVLConfig()
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*SETTLED, *overrides])
    recipe = settle_embeddings(recipe, GenerationConfig(chat_format=CHAT_FORMATS[recipe.model.path]))
    conversation = CONVERSATIONS.get(name, QUESTION)
    rows = [["cards", "of", *PHASES, "host"], ["---:"] * (len(PHASES) + 3)]
    for count in COUNTS:
        sharding = Sharding(way, count) if count > 1 else None
        for card, usable in CARDS.items():
            plan, switches = plan_on(recipe, config, conversation, card, sharding)
            if plan.fits(usable):
                rows.append([str(count), *Row(name, card, plan, switches).cells()[1:2], *cells_of(plan)])
                break
        else:
            rows.append([str(count), "none of them", *cells_of(plan)])
    return [f"| {' | '.join(row)} |" for row in rows]


def rows_of(name: str, recipe: Recipe, cards: tuple[int, ...] | None) -> list[Row]:
    """Plan a recipe on these cards, or on the smallest that it fits; if it fits none, on the largest."""
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
    recipe: Recipe, config: QwenVLConfig, conversation: Conversation, card: int, sharding: Sharding | None = None
) -> tuple[MemoryPlan, Switches]:
    """The memory plan and settings of a run on an empty card of `card` GB, or on each of several."""
    batch = recipe.train.per_device_train_batch_size
    data = alike(conversation, batch)
    if recipe.data.tokens_per_batch == "auto":
        free = card * 1_000_000_000 - CONTEXT
        budget = auto_budget(recipe, config, data, free=free, device_type="cuda", sharding=sharding).tokens
    else:
        budget = packing_budget(recipe.data, data.lengths)
    workload = worst_workload(
        data.lengths.tolist(), data.supervised.tolist(), data.images.tolist(), budget=budget, batch=batch
    )
    switches = choose_switches(recipe, config, workload, CARDS[card], device_type="cuda", sharding=sharding)
    return plan_memory(recipe, config, workload, switches=switches, sharding=sharding), switches


def alike(conversation: Conversation, count: int) -> Checked:
    """The result of checking a data set of `count` such conversations."""
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
