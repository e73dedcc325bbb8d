"""Arguments that several commands have, and the types of arguments: text of the command line to values."""

import argparse
import math
import re
from pathlib import Path

DTYPES = ("auto", "bfloat16", "float16", "float32")
UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12}


def add_recipe(parser: argparse.ArgumentParser, recipe_help: str = "YAML file; recipes/ has one for each job") -> None:
    """`RECIPE [key.path=value ...]`, for `load_recipe(arguments.recipe, arguments.overrides)`."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help=recipe_help)
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="keys of the recipe to change")


def add_dtype(parser: argparse._ActionsContainer, stored: str = "they are stored") -> None:
    """`--dtype`; auto is as `stored` says."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help=f"type of the weights; auto (the default) is as {stored}"
    )


def add_quantization(parser: argparse._ActionsContainer) -> None:
    """`--quantization`; None without it."""
    parser.add_argument(
        "--quantization",
        choices=("nf4", "none"),
        help="nf4 holds the language model in 4 bits, none loads 16 bits; by default as stored, and as trained",
    )


def add_base(parser: argparse._ActionsContainer) -> None:
    """`--base`; None without it."""
    parser.add_argument("--base", metavar="BASE", help="the adapter's base (folder or hub id), where it was moved")


def add_style(parser: argparse._ActionsContainer) -> None:
    """`--style`; None without it."""
    parser.add_argument("--style", choices=("chat", "base"), help="ChatML, or raw text; by default as the model says")


def views(text: str) -> str:
    """`none`, or the grid of the parts of a page, rows x columns, and their overlap: `2x2`, `3x2:0.2`."""
    if text != "none" and not re.fullmatch(r"[1-9]x[1-9](:[01]?(\.\d+)?)?", text):
        raise argparse.ArgumentTypeError(f"must be none, or rows x columns such as 2x2 or 3x2:0.2, not {text!r}")
    return text


def count(text: str) -> int:
    """A whole number from 1."""
    return _from_1(text, "whole number")


def pixels(text: str) -> int:
    """A number of pixels from 1."""
    return _from_1(text, "number of pixels")


def _from_1(text: str, what: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a {what} from 1, not {text!r}")
    return int(text)


def non_negative(text: str) -> float:
    """A finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0, not {text!r}")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = non_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def size(text: str) -> float:
    """5GB, 500MB: bytes, by powers of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]B)", text.upper())
    value = 0.0 if match is None else float(match[1]) * UNITS[match[2]]
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return value
