"""`finetune merge RUN --to DIR`"""

import argparse
from pathlib import Path

from finetune.commands.arguments import add_base, add_dtype, add_style, size
from finetune.errors import MissingFileError, UserError
from finetune.files.output_paths import refuse_unwritable_folder
from finetune.merge.adapter_config import find_adapter
from finetune.run.checkpoints import checkpoint_path, step_of, verify
from qwenvl.checkpoint.adapter_files import ADAPTER_CONFIG

SUMMARY = "merge the adapter of a run into its base: one checkpoint, checked, for any program"
WHEN_STOPPED = "nothing was written under the folder's name"
EXAMPLES = """\
finetune merge runs/docvqa --to models/docvqa
finetune merge runs/docvqa --to models/docvqa --dtype bfloat16 --shard-size 2GB
finetune merge runs/docvqa --checkpoint step-400 --to models/docvqa-400   # of any run, with or without an adapter
finetune merge path/to/adapter --base Qwen/Qwen-VL-Chat --to models/other"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or adapter folder in PEFT's format")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument(
        "--checkpoint", metavar="step-N", help="a checkpoint of the run, in place of its result; also of one in full"
    )
    add_base(parser)
    add_style(parser)
    add_dtype(parser, "the base is stored, or, trained in full, as the run's result")
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
    source: Path = arguments.run
    if arguments.checkpoint is not None:
        source = find_checkpoint(arguments.run, arguments.checkpoint)
    in_full = source is not arguments.run and not (source / ADAPTER_CONFIG).is_file()
    if not in_full:
        find_adapter(source)
    refuse_unwritable_folder(arguments.to, "the merged model", "--to")
    if in_full and (arguments.style or arguments.onto or arguments.no_check):
        raise UserError(f"{source} was trained in full: --style, --onto and --no-check are for adapters")
    # Nothing heavy is imported before the arguments are known to be right.
    from transformers.utils import logging

    from finetune.merge.full_checkpoint import write_model
    from finetune.merge.merge import merge

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if arguments.checkpoint is not None:
        verify(source)
    if in_full:
        write_model(
            source,
            arguments.to,
            base=arguments.base,
            dtype=arguments.dtype,
            shard_bytes=arguments.shard_size,
            overwrite=arguments.overwrite,
        )
        return
    merge(
        source,
        arguments.to,
        base=arguments.base,
        style=arguments.style,
        dtype=arguments.dtype,
        onto=arguments.onto,
        shard_bytes=arguments.shard_size,
        check=not arguments.no_check,
        overwrite=arguments.overwrite,
    )


def find_checkpoint(run: Path, name: str) -> Path:
    """A checkpoint of a run by its name.

    Raises:
        MissingFileError: there is none of this name; says which there are.
    """
    folder = run / "checkpoints"
    steps = sorted(
        step for file in (folder.iterdir() if folder.is_dir() else ()) if (step := step_of(file)) is not None
    )
    step = step_of(name)
    if step is None or step not in steps:
        there = ", ".join(f"step-{each}" for each in steps) or "none"
        raise MissingFileError(f"{run} has no checkpoint {name}. There are: {there}")
    return checkpoint_path(folder, step)
