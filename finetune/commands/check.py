"""`finetune check RECIPE [key.path=value ...]`, and `finetune check FILE` for data without a recipe"""

import argparse
from pathlib import Path

from finetune.commands.arguments import add_recipe
from finetune.errors import UserError
from finetune.files.output_paths import refuse_unwritable_file
from finetune.recipe import load_recipe

SUMMARY = "check a recipe and its data before training, and show what is trained; loads no weights"
WHEN_STOPPED = "a check changes nothing"
EXAMPLES = """\
finetune check recipes/quickstart.yaml
finetune check data/rows.jsonl   # no recipe: guesses the format, and writes the data section
finetune check data/rows.csv encoding=gbk
finetune check recipes/docvqa_lora.yaml data.train.limit=2000 --images
finetune check recipes/grounding_lora.yaml --samples 20 --html runs/grounding.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "YAML file; or a data file or folder, to see what is in it and how a recipe reads it")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="samples to show; 3 by default")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page, with images and boxes")
    parser.add_argument("--images", action="store_true", help="open every image, not only see that it is there")


def run(arguments: argparse.Namespace) -> None:
    if is_data(arguments.recipe) and not (arguments.recipe.suffix == ".json" and arguments.overrides):
        from finetune.check.data_file import check_data

        check_data(arguments.recipe, samples=max(arguments.samples, 0), keys=file_keys(arguments))
        return
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.html is not None:
        refuse_unwritable_file(arguments.html, "the page", "--html")
    # Nothing heavy is imported before the recipe is known to be right.
    from finetune.check.check import check

    check(recipe, samples=max(arguments.samples, 0), html=arguments.html, images=arguments.images)


def file_keys(arguments: argparse.Namespace) -> dict[str, str]:
    """The keys given with a data file: those by which it is read.

    Raises:
        UserError: other keys or options, or another file.
    """
    from finetune.check.data_file import FILE_KEYS

    if arguments.html is not None or arguments.images:
        raise UserError(f"{arguments.recipe} is data: --html and --images go with a recipe")
    keys = {}
    for given in arguments.overrides:
        key, equals, value = given.partition("=")
        if not equals and Path(given).exists():
            raise UserError(
                f"{arguments.recipe} and {given}: one file or folder is looked at; several with rows of the same kind "
                "are given as one pattern, in quotes: 'data/*.jsonl'"
            )
        if key not in FILE_KEYS or not value:
            raise UserError(
                f"{arguments.recipe} is data: keys such as {given} go with a recipe, but for {', '.join(FILE_KEYS)} "
                "of a file (encoding=gbk)"
            )
        keys[key] = value
    return keys


def is_data(path: Path) -> bool:
    """Whether a path is a data file or folder, or a pattern of such, and not a recipe: those end in .yaml, .yml or
    nothing, and are not the data.yaml of a YOLO folder."""
    if path.suffix.lower() in (".yaml", ".yml"):
        from finetune.check.export_layout import is_yolo_yaml

        return is_yolo_yaml(path)
    if path.is_dir() or (path.is_file() and path.suffix != ""):
        return True
    return not path.exists() and any(mark in str(path) for mark in "*?[")
