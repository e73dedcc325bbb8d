"""`trl sft` and its like: they start their processes by `accelerate launch`, and each must know the family."""

import functools
from argparse import Namespace

from finetune.errors import UserError
from finetune.programs.internals import require_parameters
from finetune.run.launch import launched_processes

REGISTERED = "finetune.programs.registered"


def prepare_trl() -> None:
    """Let the processes that `trl` starts run its scripts with the family registered.

    Raises:
        UserError: this process is one of several already; or TRL is another than is known here.
    """
    if launched_processes() > 1:
        raise UserError(
            "run trl: trl starts its own processes, and a launcher started this one: leave the launcher out and give "
            "trl --num_processes N"
        )
    from trl.cli import accelerate_launcher

    launch = accelerate_launcher.launch_training_script
    require_parameters("trl", "cli.accelerate_launcher.launch_training_script", launch, ["launch_command_fn"])
    accelerate_launcher.launch_training_script = functools.partial(launch, launch_command_fn=launch_registered)


def launch_registered(arguments: Namespace) -> None:
    """`accelerate launch`, with `finetune.programs.registered` in front of the script.

    Args:
        arguments: of `accelerate launch`, parsed.
    """
    from accelerate.commands.launch import launch_command

    arguments.training_script_args = [arguments.training_script, *arguments.training_script_args]
    arguments.training_script, arguments.module = REGISTERED, True
    launch_command(arguments)
