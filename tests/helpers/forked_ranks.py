"""Several processes as a launcher starts them, forked from one where what they import is there already.

They have no launcher over them: one that fails does not end the others.
"""

import os
import socket
import subprocess
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from forked_finetune import FORKING, run_forked


def free_port() -> str:
    with closing(socket.socket()) as place:
        place.bind(("localhost", 0))
        return str(place.getsockname()[1])


def variables_of_ranks(processes: int) -> list[dict[str, str]]:
    """What a launcher puts into the environment of each process."""
    together = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    together |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    return [{**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def finetune_on(
    processes: int,
    *arguments: str | Path,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    folders: Sequence[Path] | None = None,
    program: Path | None = None,
) -> list[subprocess.CompletedProcess]:
    """Run the command on several processes; what each of them said.

    Args:
        folders: working directory of each; None for this one's.
        program: a script to run in place of the command.
    """
    words = [*map(str, arguments)]
    variables = variables_of_ranks(processes)

    def one(rank: int) -> subprocess.CompletedProcess:
        own = {**(env or os.environ), **variables[rank]}
        return run_forked(words, timeout, program, None if folders is None else folders[rank], own)

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(one, range(processes)))


def on_ranks(processes: int, work: Callable[..., None], *arguments: Any, timeout: float = 120) -> None:
    """Call a function of a module on several processes, each with a process group and its rank as first argument."""
    errors = FORKING.SimpleQueue()
    started = [
        FORKING.Process(target=_work, args=(errors, own, work, arguments), daemon=True)
        for own in variables_of_ranks(processes)
    ]
    for one in started:
        one.start()
    for one in started:
        one.join(timeout)
    alive = [one for one in started if one.exitcode is None]
    for one in alive:
        one.kill()
        one.join()
    assert errors.empty(), errors.get()
    assert not alive, f"{len(alive)} of {processes} processes wait for ever"


def _work(errors: Any, variables: Mapping[str, str], work: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo")
        work(int(variables["RANK"]), *arguments)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        errors.put(f"process {variables['RANK']}:\n{traceback.format_exc()}")
        os._exit(1)
