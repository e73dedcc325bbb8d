"""`finetune serve MODEL`"""

import argparse
from collections.abc import Sequence
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
from finetune.llamacpp.gguf_files import gguf_files

SUMMARY = "serve a model with images to programs that speak OpenAI's API"
WHEN_STOPPED = "replies that ran were finished, or ended after --grace"
EXAMPLES = """\
finetune serve runs/docvqa
finetune serve Qwen/Qwen-VL-Chat --quantization nf4 --port 9000
finetune serve Qwen/Qwen-VL-Chat --adapter contracts=runs/a --adapter charts=runs/b
finetune serve models/docvqa --host 0.0.0.0 --api-key-file keys.txt
finetune serve models/docvqa-gguf --threads 8
finetune serve models/docvqa-qwen2 --engine vllm --at http://10.0.0.7:8000"""


ENGINES = ("pytorch", "llama.cpp", "vllm")

OF_A_MODEL_HERE = (
    "adapter",
    "base_name",
    "base",
    "dtype",
    "quantization",
    "batch_rows",
    "batch_tokens",
    "allow_adapter_changes",
    "keep",
    "threads",
)
"""Arguments about a model in this process."""

OF_PYTORCH = ("adapter", "base_name", "base", "dtype", "quantization", "allow_adapter_changes", "keep")
"""Arguments that llama.cpp has no use for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run, adapter, checkpoint, merged or GGUF folder, or hub id")
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
    models.add_argument(
        "--engine",
        choices=ENGINES,
        help="what makes the replies: PyTorch in this process (the default); llama.cpp, where MODEL is a folder of "
        "finetune export --to gguf (then the default); or a vLLM server (--at) that serves MODEL, a folder of "
        "finetune export --to qwen2",
    )
    models.add_argument("--at", metavar="URL", help="of the vLLM server, started with --enable-prompt-embeds")
    models.add_argument("--at-key-file", metavar="FILE", type=Path, help="the key of the vLLM server, if it has one")
    models.add_argument(
        "--threads", metavar="N", type=count, help="of llama.cpp (default: as many as PyTorch computes with)"
    )
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
        help="requests that wait, of a vLLM server those that it has at once; others are answered 429 (default: 64)",
    )
    limits.add_argument(
        "--batch-rows", metavar="N", type=count, default=64, help="replies that grow together (default: 64)"
    )
    limits.add_argument(
        "--batch-tokens",
        metavar="N",
        type=count,
        help="replies that grow together, times the longest of them with its prompt (default: 8192; with llama.cpp, "
        "whose memory for them is taken at the start, as many as one may have)",
    )
    limits.add_argument(
        "--keep",
        metavar="SIZE",
        type=size,
        default=1e9,
        help="memory for images and beginnings of prompts that may be asked about again (default: 1GB)",
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
    engine = check_engine(arguments)
    adapters = dict(arguments.adapter)
    if len(adapters) < len(arguments.adapter):
        raise UserError("--adapter: two have the same name; give each a name of its own")
    # Nothing heavy is imported before the arguments are known to be right.
    from transformers.utils import logging

    from finetune.batches.budget import REPLY_BATCH_TOKENS
    from finetune.serve.batch_bounds import BatchBounds
    from finetune.serve.model_to_open import ModelToOpen, pytorch_model
    from finetune.serve.serve import ServeOptions, serve

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def find_model() -> ModelToOpen:
        """The one place that knows what computes replies."""
        if engine == "llama.cpp":
            from finetune.serve.gguf_to_open import llamacpp_model

            return llamacpp_model(
                arguments.model,
                name=arguments.name,
                style=arguments.style,
                system=arguments.system,
                prompt=arguments.prompt,
                rows=arguments.batch_rows,
                tokens=arguments.batch_tokens,
                threads=arguments.threads,
                max_queue=arguments.max_queue,
            )
        if engine == "vllm":
            from finetune.serve.vllm_model import read_server_key, vllm_model

            return vllm_model(
                arguments.model,
                arguments.at,
                key=None if arguments.at_key_file is None else read_server_key(arguments.at_key_file),
                name=arguments.name,
                style=arguments.style,
                system=arguments.system,
                prompt=arguments.prompt,
                max_open=arguments.max_queue,
            )
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
            bounds=BatchBounds(rows=arguments.batch_rows, tokens=arguments.batch_tokens or REPLY_BATCH_TOKENS),
            max_queue=arguments.max_queue,
            keep_bytes=int(arguments.keep),
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


def check_engine(arguments: argparse.Namespace) -> str:
    """The engine; what has no effect with it is refused.

    Raises:
        UserError: there is such an argument, or one is missing.
    """
    is_gguf = bool(gguf_files(arguments.model))
    engine: str = arguments.engine or ("llama.cpp" if is_gguf else "pytorch")
    if is_gguf and engine != "llama.cpp":
        raise UserError(f"{arguments.model} has its language model in a GGUF file, which only --engine llama.cpp runs")
    if engine != "vllm":
        for option in ("at", "at_key_file"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} is for a vLLM server: give --engine vllm as well")
    if engine == "vllm":
        if arguments.at is None:
            raise UserError(
                "--engine vllm needs --at URL, the address of the vLLM server, such as http://localhost:8000"
            )
        _refuse(arguments, OF_A_MODEL_HERE, "with --engine vllm, as the vLLM server has the model")
    elif engine == "llama.cpp":
        _refuse(arguments, OF_PYTORCH, "with llama.cpp, which runs what finetune export --to gguf wrote")
    else:
        _refuse(arguments, ("threads",), "with PyTorch, whose threads the environment's OMP_NUM_THREADS says")
    return engine


def _refuse(arguments: argparse.Namespace, options: Sequence[str], why: str) -> None:
    """Refuse arguments that are given.

    Raises:
        UserError: one is.
    """
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    for option in options:
        if getattr(arguments, option) != defaults.get_default(option):
            raise UserError(f"--{option.replace('_', '-')} has no effect {why}: leave it out")


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
