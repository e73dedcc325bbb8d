"""`finetune prepare RECIPE [key.path=value ...] --to DIR [--image-size PIXELS]`"""

import argparse
from pathlib import Path

from finetune.commands.arguments import add_recipe, pixels
from finetune.files.output_paths import refuse_unwritable_folder
from finetune.recipe import load_recipe

SUMMARY = "write the recipe's data once, checked and with its images inside, to train from"
WHEN_STOPPED = "the files written so far stay: the same command continues"
EXAMPLES = """\
finetune prepare recipes/docvqa_lora.yaml --to /data/docvqa
finetune prepare recipes/docvqa_lora.yaml data.on_bad_row=skip --to /data/docvqa --image-size 1024"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "YAML file whose data is written")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--image-size",
        metavar="PIXELS",
        type=pixels,
        help="store images with a longer side than this as smaller copies; without it all bytes stay as they are",
    )


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    refuse_unwritable_folder(arguments.to, "the prepared data", "--to", replaced=False)
    # Nothing heavy is imported before the recipe is known to be right.
    from finetune.data.prepare import prepare

    prepare(recipe, arguments.to, arguments.image_size)
