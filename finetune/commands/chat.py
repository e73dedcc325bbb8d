"""`finetune chat MODEL`"""

import argparse
from pathlib import Path

from finetune.commands.arguments import add_base, add_dtype, add_quantization, add_style, count, non_negative
from finetune.errors import UserError
from finetune.files.output_paths import refuse_unwritable_file

SUMMARY = "talk to a model in the terminal, or ask it one thing"
WHEN_STOPPED = "the conversation is not saved"
EXAMPLES = """\
finetune chat runs/docvqa --image receipt.jpg
finetune chat Qwen/Qwen-VL-Chat --quantization nf4
finetune chat models/docvqa --image receipt.jpg --once "What is the total?"
finetune chat models/docvqa --image street.jpg --once "Where is the red car?" --boxes found.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run, adapter, checkpoint, merged or GGUF folder, or hub id")
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        type=Path,
        help="for the first message; may be repeated; scan.pdf#3 is the third page of a file",
    )
    parser.add_argument("--once", metavar="TEXT", help="ask this; only the reply goes to stdout")
    parser.add_argument("--system", metavar="TEXT", help="system message; by default as trained")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="each message is put in place of its {question}; by default the prompt that the model was trained with, "
        "where there was one; plain is none",
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=count, default=512, help="of a reply at most (default: 512)"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=non_negative,
        default=0.0,
        help="0 (the default) always takes the likeliest token, 1 draws tokens as likely as they are",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=count,
        help="of llama.cpp, where MODEL is a folder of finetune export --to gguf (default: as many as PyTorch uses)",
    )
    add_base(parser)
    add_style(parser)
    add_dtype(parser)
    add_quantization(parser)
    parser.add_argument(
        "--boxes",
        metavar="FILE",
        type=Path,
        help="draw the boxes of a reply into this image (default: IMAGE_boxes.png)",
    )


def run(arguments: argparse.Namespace) -> None:
    for image in arguments.image:
        # A page of a file, such as scan.pdf#3, is not a file by itself.
        file, hash_sign, page = str(image).rpartition("#")
        if not image.is_file() and not (hash_sign and page.isdecimal() and Path(file).is_file()):
            raise UserError(f"--image {image}: there is no such file")
    if arguments.once is not None and not arguments.once.strip():
        raise UserError("--once is empty: give the text to ask")
    if arguments.boxes is not None:
        refuse_unwritable_file(arguments.boxes, "the boxes", "--boxes")
    # Nothing heavy is imported before the arguments are known to be right.
    from transformers.utils import logging

    from finetune.chat.terminal_chat import chat

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    chat(
        arguments.model,
        base=arguments.base,
        style=arguments.style,
        images=arguments.image,
        once=arguments.once,
        system=arguments.system,
        prompt=arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        boxes=arguments.boxes,
        threads=arguments.threads,
    )
