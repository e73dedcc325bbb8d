"""`finetune demo MODEL`"""

import argparse
import importlib.util
from pathlib import Path

from finetune.commands.arguments import add_base, add_dtype, add_quantization, add_style
from finetune.errors import UserError

SUMMARY = "try a model in the browser: a page to ask about images, alone or beside its base"
WHEN_STOPPED = "the page is closed, and what was uploaded is removed"
EXAMPLES = """\
finetune demo runs/docvqa
finetune demo runs/docvqa --compare Qwen/Qwen-VL-Chat
finetune demo models/docvqa --host 0.0.0.0 --password-file passwords.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run, adapter, checkpoint, merged or GGUF folder, or hub id")
    parser.add_argument(
        "--compare",
        metavar="BASE",
        help="a second model, which answers beside it; the base of an adapter is the same model in memory",
    )
    parser.add_argument(
        "--port", metavar="N", type=port, help="to listen on; by default the first one that is free from 7860"
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="to listen on (default: 127.0.0.1, this machine alone); any other needs --password-file",
    )
    parser.add_argument(
        "--password-file", metavar="FILE", type=Path, help="lines name:password of those who may open the page"
    )
    add_base(parser)
    add_style(parser)
    add_dtype(parser)
    add_quantization(parser)


def port(text: str) -> int:
    """A number of a port; 0 is any that is free."""
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535, not {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UserError('the page needs Gradio: pip install "qwenvl-finetune[demo]"')
    # Nothing heavy is imported before the arguments are known to be right.
    from transformers.utils import logging

    from finetune.demo.demo import run_demo

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    run_demo(
        arguments.model,
        arguments.compare,
        host=arguments.host,
        port=arguments.port,
        password_file=arguments.password_file,
        base=arguments.base,
        style=arguments.style,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
    )
