"""`finetune bench RECIPE [key.path=value ...]`"""

import argparse
from pathlib import Path

from finetune.commands.arguments import add_recipe, count
from finetune.files.output_paths import refuse_unwritable_folder
from finetune.recipe import load_recipe

SUMMARY = "measure memory and time of a recipe's training on this machine, beside the published settings"
WHEN_STOPPED = "the rows so far are in the folder of --to"
EXAMPLES = """\
finetune bench recipes/quickstart.yaml --steps 2
finetune bench recipes/docvqa_qlora.yaml --both
finetune bench recipes/docvqa_lora.yaml --lengths mix --profiles ours data.tokens_per_batch=4096"""

LENGTHS = "384,512,1024,2048,mix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "YAML file; its data is not read")
    parser.add_argument(
        "--lengths",
        type=read_lengths,
        default=read_lengths(LENGTHS),
        metavar="N,N,mix",
        help=f"tokens of a sample, or mix: lengths as of questions on documents ({LENGTHS} by default)",
    )
    parser.add_argument("--steps", type=count, default=5, metavar="N", help="steps to measure; 5 by default")
    parser.add_argument(
        "--size",
        choices=("recipe", "full"),
        default="recipe",
        help="full takes the published sizes in place of those of the recipe's checkpoint",
    )
    parser.add_argument(
        "--profiles",
        choices=("both", "ours", "published"),
        default="both",
        help="the settings of the recipe, those of the published script, or both (the default)",
    )
    parser.add_argument("--both", action="store_true", help="measure LoRA and Q-LoRA, whichever the recipe says")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder for the results (default: runs/bench-RECIPE)")


def read_lengths(text: str) -> tuple[str, ...]:
    """Whole numbers and `mix`, separated by commas."""
    lengths = tuple(part.strip() for part in text.split(","))
    for length in lengths:
        if length != "mix" and not (length.isascii() and length.isdecimal() and int(length) > 0):
            raise argparse.ArgumentTypeError(f"{length!r} is neither a number of tokens nor mix")
    if len(set(lengths)) < len(lengths):
        raise argparse.ArgumentTypeError("a length is given twice")
    return lengths


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    to = arguments.to or Path("runs", f"bench-{arguments.recipe.stem}")
    refuse_unwritable_folder(to, "the results", "--to", replaced=False)
    # Nothing heavy is imported before the recipe is known to be right.
    from finetune.bench.bench import Bench, bench

    bench(
        Bench(
            recipe,
            str(arguments.recipe),
            arguments.lengths,
            arguments.steps,
            arguments.size,
            ("ours", "published") if arguments.profiles == "both" else (arguments.profiles,),
            arguments.both,
        ),
        to,
    )
