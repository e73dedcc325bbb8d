"""`finetune serve MODEL`"""

import argparse
from pathlib import Path

from finetune.commands.arguments import (
    add_base,
    add_dtype,
    add_quantization,
    add_style,
    count,
    non_negative,
    pixels,
    positive,
    size,
)
from finetune.errors import UserError

SUMMARY = "serve a model with images to programs that speak OpenAI's API"
WHEN_STOPPED = "replies that ran were finished, or ended after --grace"
EXAMPLES = """\
finetune serve runs/docvqa
finetune serve Qwen/Qwen-VL-Chat --quantization nf4 --port 9000
finetune serve Qwen/Qwen-VL-Chat --adapter contracts=runs/a --adapter charts=runs/b
finetune serve models/docvqa --host 0.0.0.0 --api-key-file keys.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run, adapter, checkpoint or merged folder, or hub id")
    models = parser.add_argument_group("what is served")
    models.add_argument(
        "--adapter",
        metavar="NAME=FOLDER",
        action="append",
        default=[],
        type=named_folder,
        help="another adapter on the same base, under a name of its own; may be repeated",
    )
    models.add_argument("--name", metavar="NAME", help="of the model in requests; by default its folder's or run's")
    models.add_argument("--base-name", metavar="NAME", help="serve the base of an adapter too, under this name")
    add_base(models)
    add_dtype(models)
    add_quantization(models)
    asked = parser.add_argument_group("how it is asked")
    add_style(asked)
    asked.add_argument("--system", metavar="TEXT", help="system message of requests without one; default: as trained")
    asked.add_argument(
        "--prompt",
        metavar="TEXT",
        help="each message of a user is put in place of its {question}; by default the prompt that the model was "
        "trained with, where there was one; plain is none",
    )
    asked.add_argument(
        "--temperature",
        metavar="T",
        type=temperature,
        default=0.0,
        help="of requests that give none; 0 (the default) always takes the likeliest token",
    )
    reach = parser.add_argument_group("who can ask")
    reach.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    reach.add_argument("--port", type=port, default=8000, help="default: 8000; 0 picks a free one and says it")
    reach.add_argument("--api-key-file", metavar="FILE", type=Path, help="keys, one a line: requests must have one")
    reach.add_argument(
        "--cors",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="web pages of this origin may ask, such as http://localhost:3000; may be repeated",
    )
    reach.add_argument("--allow-urls", action="store_true", help="fetch images from public http(s) URLs")
    reach.add_argument(
        "--allow-adapter-changes",
        metavar="FOLDER",
        action="append",
        default=[],
        type=Path,
        help="clients may load adapters from this folder, and drop adapters; may be repeated",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-model-len",
        metavar="N",
        type=count,
        help="tokens of a prompt and its reply (default: as long as the model was trained on)",
    )
    limits.add_argument(
        "--max-body", metavar="SIZE", type=size, default=32e6, help="of a request with its images (default: 32MB)"
    )
    limits.add_argument("--max-images", metavar="N", type=count, default=16, help="of a request (default: 16)")
    limits.add_argument(
        "--max-pixels", metavar="N", type=pixels, default=40_000_000, help="of an image (default: 40000000)"
    )
    limits.add_argument(
        "--max-queue",
        metavar="N",
        type=count,
        default=64,
        help="requests that wait; others are answered 429 (default: 64)",
    )
    limits.add_argument(
        "--batch-rows", metavar="N", type=count, default=64, help="replies that grow together (default: 64)"
    )
    limits.add_argument(
        "--batch-tokens",
        metavar="N",
        type=count,
        default=8192,
        help="replies that grow together, times the longest of them with its prompt (default: 8192)",
    )
    limits.add_argument(
        "--timeout", metavar="SECONDS", type=positive, default=600.0, help="of a request (default: 600)"
    )
    limits.add_argument(
        "--grace",
        metavar="SECONDS",
        type=non_negative,
        default=30.0,
        help="that replies have to finish when the server is stopped (default: 30)",
    )


def run(arguments: argparse.Namespace) -> None:
    adapters = dict(arguments.adapter)
    if len(adapters) < len(arguments.adapter):
        raise UserError("--adapter: two have the same name; give each a name of its own")
    # Nothing heavy is imported before the arguments are known to be right.
    from transformers.utils import logging

    from finetune.serve.batch_bounds import BatchBounds
    from finetune.serve.model_to_open import ModelToOpen, pytorch_model
    from finetune.serve.serve import ServeOptions, serve

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def find_model() -> ModelToOpen:
        """The one place that knows what computes replies."""
        return pytorch_model(
            arguments.model,
            name=arguments.name,
            adapters=adapters,
            base_name=arguments.base_name,
            base=arguments.base,
            style=arguments.style,
            system=arguments.system,
            prompt=arguments.prompt,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            bounds=BatchBounds(rows=arguments.batch_rows, tokens=arguments.batch_tokens),
            max_queue=arguments.max_queue,
        )

    serve(
        find_model,
        ServeOptions(
            host=arguments.host,
            port=arguments.port,
            key_file=arguments.api_key_file,
            cors=arguments.cors,
            allow_urls=arguments.allow_urls,
            adapter_folders=arguments.allow_adapter_changes,
            max_model_len=arguments.max_model_len,
            max_body=int(arguments.max_body),
            max_images=arguments.max_images,
            max_pixels=arguments.max_pixels,
            timeout=arguments.timeout,
            grace=arguments.grace,
            temperature=arguments.temperature,
        ),
    )


def named_folder(text: str) -> tuple[str, str]:
    """`NAME=FOLDER`"""
    name, equals, folder = text.partition("=")
    if not name or not equals or not folder:
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, such as contracts=runs/a, not {text!r}")
    return name, folder


def port(text: str) -> int:
    """A port, or 0 for any."""
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, not {text!r}")
    return int(text)


def temperature(text: str) -> float:
    """A temperature as requests may have it."""
    value = non_negative(text)
    if value > 2:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 2, not {text!r}")
    return value
