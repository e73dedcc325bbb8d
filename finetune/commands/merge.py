"""`finetune merge RUN --to DIR`"""

import argparse
from pathlib import Path

from finetune.commands.arguments import add_base, add_dtype, add_style, size
from finetune.files.output_paths import refuse_unwritable_folder
from finetune.merge.adapter_config import find_adapter

SUMMARY = "merge the adapter of a run into its base: one checkpoint, checked, for any program"
WHEN_STOPPED = "nothing was written under the folder's name"
EXAMPLES = """\
finetune merge runs/docvqa --to models/docvqa
finetune merge runs/docvqa --to models/docvqa --dtype bfloat16 --shard-size 2GB
finetune merge path/to/adapter --base Qwen/Qwen-VL-Chat --to models/other"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or adapter folder in PEFT's format")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="folder to write; must not exist yet")
    add_base(parser)
    add_style(parser)
    add_dtype(parser, "the base is stored")
    parser.add_argument(
        "--onto",
        choices=("base", "dequantized"),
        help="after training in 4 bits: merge into the weights that training saw (dequantized, the default), or into "
        "the base's own",
    )
    parser.add_argument(
        "--shard-size", metavar="SIZE", type=size, default=5e9, help="of a weight file at most (default: 5GB)"
    )
    parser.add_argument("--no-check", action="store_true", help="do not read back, load and compare what was written")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR where it exists")


def run(arguments: argparse.Namespace) -> None:
    find_adapter(arguments.run)
    refuse_unwritable_folder(arguments.to, "the merged model", "--to")
    # Nothing heavy is imported before the arguments are known to be right.
    from transformers.utils import logging

    from finetune.merge.merge import merge

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    merge(
        arguments.run,
        arguments.to,
        base=arguments.base,
        style=arguments.style,
        dtype=arguments.dtype,
        onto=arguments.onto,
        shard_bytes=arguments.shard_size,
        check=not arguments.no_check,
        overwrite=arguments.overwrite,
    )
