"""The command line: `finetune RECIPE [key.path=value ...]`.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong, 130 / 143 interrupted with the state saved.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from finetune.recipe import RecipeError, load_recipe

USAGE = """\
finetune RECIPE [key.path=value ...]    train as the recipe says, or go on with an interrupted run

    finetune recipes/quickstart.yaml
    finetune recipes/docvqa_lora.yaml train.max_steps=100 output=runs/first-try
    torchrun --nproc-per-node 2 -m finetune recipes/docvqa_lora.yaml

Recipes are in recipes/; every key can be overridden. README.md has one explained line by line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    recipe_file, *overrides = arguments
    try:
        recipe = load_recipe(Path(recipe_file), overrides)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    # Only now, with a recipe known to be right, is anything heavy imported. What the libraries tell programmers, about
    # names that they will drop, is not for the reader of a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")
    from finetune.interrupts import Interrupted
    from finetune.run import RunLocked
    from finetune.train import UserError, train
    from finetune.trainer import NonFiniteLoss

    try:
        train(recipe)
    except Interrupted as stopped:
        state = "the state is saved: the same command goes on" if stopped.saved else "nothing was under way to save"
        print(f"interrupted by {stopped}; {state}", file=sys.stderr)
        return stopped.exit_code
    except NonFiniteLoss as error:
        print(error, file=sys.stderr)
        return 1
    except (UserError, RunLocked, ValueError, OSError) as error:
        # The same types come out of libraries that trip over a fault of ours; those keep their traceback.
        if not raised_by_us(error):
            raise
        print(error, file=sys.stderr)
        return 2
    return 0


def raised_by_us(error: BaseException) -> bool:
    """Whether an error was raised in this project's own code, as its messages to users are."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    package = frame.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package in ("finetune", "qwenvl")


if __name__ == "__main__":
    sys.exit(main())
