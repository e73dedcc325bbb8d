"""`finetune export MODEL --to FORMAT`"""

import argparse
from pathlib import Path

from finetune.commands.arguments import add_dtype, size
from finetune.errors import UserError
from finetune.export.folder import FORMATS, default_folder, refuse_existing
from finetune.export.gguf_types import TYPES
from finetune.files.output_paths import refuse_unwritable_folder

SUMMARY = "write a checkpoint in another form: safetensors, 4 bits, for servers that know Qwen2, or for llama.cpp"
WHEN_STOPPED = "nothing was written under the folder's name"
EXAMPLES = """\
finetune export models/docvqa --to nf4
finetune export Qwen/Qwen-VL-Chat --to nf4 --quantize language,vision,head
finetune export models/docvqa --to qwen2 --out models/docvqa-server
finetune export models/docvqa --to gguf --type q4_k_m
finetune export Qwen/Qwen-VL-Chat --to safetensors --dtype bfloat16 --shard-size 2GB
finetune export models/docvqa --to safetensors --push me/docvqa"""

TO = """\
safetensors: the same model in safetensors files. nf4: linears in 4 bits. qwen2: the language model as Transformers'
Qwen2, which servers know, with vision beside it. gguf: the language model for llama.cpp, which finetune serve and chat
run, with vision beside it"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint or merged folder, hub id, or the run of a training without adapter"
    )
    parser.add_argument("--to", choices=FORMATS, required=True, help=TO)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to write (default: MODEL-FORMAT beside MODEL)")
    parser.add_argument("--shard-size", metavar="SIZE", type=size, help="of a weight file at most (default: 5GB)")
    add_dtype(parser)
    parser.add_argument(
        "--quantize",
        metavar="PARTS",
        type=lambda text: tuple(text.split(",")),
        help="with nf4, what is in 4 bits: language (the default), or with it vision, head, as model.quantize says",
    )
    parser.add_argument(
        "--type",
        choices=TYPES,
        help="with gguf, what the language model's matrices are in (default: f16); of the full size they have 15.4, "
        "8.2, 4.5 and 4.8 GB",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the finished folder to the hub, as private")
    parser.add_argument("--public", action="store_true", help="with --push: let everybody see it")


def run(arguments: argparse.Namespace) -> None:
    if arguments.public and arguments.push is None:
        raise UserError("--public says who may see an upload: give --push too")
    folder = arguments.out or default_folder(arguments.model, arguments.to)
    refuse_unwritable_folder(folder, "the export", "--out")
    refuse_existing(folder)
    # Nothing heavy is imported before the arguments are known to be right.
    from transformers.utils import logging

    from finetune.export.export import export

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    export(
        arguments.model,
        arguments.to,
        out=arguments.out,
        shard_bytes=arguments.shard_size,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        type=arguments.type,
        push=arguments.push,
        public=arguments.public,
    )
