"""`finetune chat MODEL`"""

import argparse
import math
from pathlib import Path

from finetune.errors import UserError

SUMMARY = "talk to a model in the terminal, or ask it one thing"
WHEN_STOPPED = "the conversation is not saved"
EXAMPLES = """\
finetune chat runs/docvqa --image receipt.jpg
finetune chat Qwen/Qwen-VL-Chat --quantization nf4
finetune chat models/docvqa --image receipt.jpg --once "What is the total?"
finetune chat models/docvqa --image street.jpg --once "Where is the red car?" --boxes found.png"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("model", metavar="MODEL", help="run, adapter, checkpoint or merged folder, or hub id")
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        type=Path,
        help="for the first message; may be repeated",
    )
    parser.add_argument("--once", metavar="TEXT", help="ask this; only the reply goes to stdout")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=count, default=512, help="of a reply at most (default: 512)"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=temperature,
        default=0.0,
        help="0 (the default) always takes the likeliest token, 1 draws tokens as likely as they are",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="type of the weights; auto (the default) is as they are stored",
    )
    parser.add_argument("--quantization", choices=("nf4",), help="hold the language model in 4 bits")
    parser.add_argument(
        "--boxes",
        metavar="FILE",
        type=Path,
        help="draw the boxes of a reply into this image (default: IMAGE_boxes.png)",
    )


def run(arguments: argparse.Namespace):
    for image in arguments.image:
        if not image.is_file():
            raise UserError(f"--image {image}: there is no such file")
    if arguments.once is not None and not arguments.once.strip():
        raise UserError("--once is empty: give the text to ask")
    # Only now, with files that are there, is anything heavy imported.
    from transformers.utils import logging

    from finetune.chat.terminal_chat import chat

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    chat(
        arguments.model,
        images=arguments.image,
        once=arguments.once,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        boxes=arguments.boxes,
    )


def count(text: str) -> int:
    """A number from 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, not {text!r}")
    return int(text)


def temperature(text: str) -> float:
    """A number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0, not {text!r}")
    return value
