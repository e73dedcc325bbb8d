"""What a launcher (torchrun, accelerate) says of the processes that it started."""

import os


def launched_processes() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def planned_processes() -> int:
    """How many processes a check is about: `WORLD_SIZE=8 finetune check RECIPE` looks at a run of 8 in one."""
    return int(os.environ.get("WORLD_SIZE") or 1)
