"""`finetune RECIPE [key.path=value ...]`"""

import argparse
from pathlib import Path

from finetune.recipe import load_recipe

SUMMARY = "train as the recipe says, or go on with an interrupted run"
# Of a run that was stopped before training; one stopped in training has saved its state.
WHEN_STOPPED = "nothing was under way to save"
EXAMPLES = """\
finetune recipes/quickstart.yaml
finetune recipes/docvqa_lora.yaml train.max_steps=100 output=runs/first-try
torchrun --nproc-per-node 2 -m finetune recipes/docvqa_lora.yaml"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file; recipes/ has one for each job")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="any key of the recipe, set anew")


def run(arguments: argparse.Namespace):
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    # Only now, with a recipe known to be right, is anything heavy imported.
    from finetune.training.train import train

    train(recipe)
