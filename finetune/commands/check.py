"""`finetune check RECIPE [key.path=value ...]`"""

import argparse
from pathlib import Path

from finetune.commands.arguments import add_recipe
from finetune.files.output_paths import refuse_unwritable_file
from finetune.recipe import load_recipe

SUMMARY = "check a recipe and its data before training, and show what is trained; loads no weights"
WHEN_STOPPED = "a check changes nothing"
EXAMPLES = """\
finetune check recipes/quickstart.yaml
finetune check recipes/docvqa_lora.yaml data.train.limit=2000 --images
finetune check recipes/grounding_lora.yaml --samples 20 --html runs/grounding.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="samples to show; 3 by default")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page, with images and boxes")
    parser.add_argument("--images", action="store_true", help="open every image, not only see that it is there")


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.html is not None:
        refuse_unwritable_file(arguments.html, "the page", "--html")
    # Nothing heavy is imported before the recipe is known to be right.
    from finetune.check.check import check

    check(recipe, samples=max(arguments.samples, 0), html=arguments.html, images=arguments.images)
