"""`finetune prepare RECIPE [key.path=value ...] --to DIR [--image-size PIXELS]`"""

import argparse
from pathlib import Path

from finetune.recipe import load_recipe

SUMMARY = "write the recipe's data once, checked and with its images inside, to train from"
WHEN_STOPPED = "the files that are written stay: the same command goes on"
EXAMPLES = """\
finetune prepare recipes/docvqa_lora.yaml --to /data/docvqa
finetune prepare recipes/docvqa_lora.yaml data.on_bad_row=skip --to /data/docvqa --image-size 1024"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file whose data is written")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="any key of the recipe, set anew")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--image-size",
        metavar="PIXELS",
        type=pixels,
        help="store images with a longer side than this as smaller copies; without it all bytes stay as they are",
    )


def pixels(text: str) -> int:
    """A number of pixels from the command line.

    Raises:
        argparse.ArgumentTypeError: none.
    """
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of pixels from 1, not {text!r}")
    return int(text)


def run(arguments: argparse.Namespace):
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    # Only now, with a recipe known to be right, is anything heavy imported.
    from finetune.data.prepare import prepare

    prepare(recipe, arguments.to, arguments.image_size)
