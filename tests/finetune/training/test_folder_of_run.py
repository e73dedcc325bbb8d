"""The machines of a run need not share a disk: the main process's folder rules, and the others get what they need."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked_ranks import finetune_on, free_port
from recipes_for_tests import ROOT, write_recipe

from finetune.errors import UserError
from finetune.recipe import load_recipe
from finetune.run.folder import RunFolder
from finetune.training.folder_of_run import FolderOfRun
from finetune.training.parallel import Parallel

TOGETHER = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test")


@pytest.fixture
def machines(tmp_path):
    """A recipe whose output is relative, and a working directory of each machine."""
    evaluate = {"data": [{"path": str(tmp_path / "eval.jsonl"), "format": "messages", "limit": 3}], "predictions": 2}
    evaluate |= {"max_new_tokens": 4}
    settings = {"adapter__dropout": 0.1, "train__max_steps": 5, "train__save_total_limit": 9, "output": "run"}
    settings |= {"train__gradient_accumulation_steps": 2, "evaluate": evaluate, "train__eval_strategy": "steps"}
    settings |= {"train__eval_steps": 2, "train__load_best_model_at_end": True}
    recipe = write_recipe(tmp_path, **settings)
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    return recipe, folders


def back_to(run: Path, step: int) -> bytes:
    """As if the run had been killed after this step; its adapter."""
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"status": "running"}))
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return adapter


def adapter_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


def test_a_run_without_a_shared_disk_trains_and_goes_on(machines):
    recipe, folders = machines
    done = finetune_on(2, recipe, folders=folders)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "run is not on a disk that all 2 processes share: 1 get copies" in done[0].stdout
    run = folders[0] / "run"
    assert names(folders[1]) == []
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(names(run / "checkpoints" / "step-2"))
    adapter = back_to(run, 2)
    done = finetune_on(2, recipe, folders=folders)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "from step 2" in done[0].stdout and "sending step-2" in done[0].stdout
    assert adapter_of(run) == adapter
    assert names(folders[1]) == [] and not list(run.glob(".seen*"))


def test_other_data_on_another_machine_is_refused(machines, tmp_path):
    """And what is wrong on one machine ends the others, which would wait for ever."""
    recipe, folders = machines
    text = recipe.read_text().replace(str(tmp_path / "train.jsonl"), "train.jsonl")
    recipe.write_text(text.replace(f"images_root: {ROOT}", "images_root: /"))
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (folders[0] / "train.jsonl").write_text("".join(lines))
    (folders[1] / "train.jsonl").write_text("".join(lines[:-1]))
    done = finetune_on(2, recipe, folders=folders)
    assert [one.returncode for one in done] == [2, 2]
    assert "data: not the same on all machines" in done[1].stderr
    assert done[0].stderr.strip().endswith("put it on a disk that all share")
    (folders[1] / "train.jsonl").unlink()
    done = finetune_on(2, recipe, folders=folders)
    assert [one.returncode for one in done] == [2, 2]
    assert "process 1: " in done[0].stderr and "train.jsonl" in done[0].stderr


@pytest.mark.parametrize(
    ("way", "full", "refused"),
    [
        ("fsdp", True, True),
        ("zero2", False, True),
        ("fsdp", False, False),
        ("ddp", True, False),
        ("none", True, False),
    ],
)
def test_state_in_parts_needs_a_shared_disk(machines, way, full, refused):
    """An adapter is gathered, and written by the main process alone."""
    recipe = load_recipe(machines[0])
    if full:
        recipe = recipe.model_copy(update={"adapter": None})
    apart = FolderOfRun(RunFolder("run"), is_shared=False)
    with pytest.raises(UserError, match="put output on a disk that all") if refused else contextlib.nullcontext():
        apart.require_for(recipe, Parallel(way))
    FolderOfRun(RunFolder("run")).require_for(recipe, Parallel(way))


def two_agents(recipe: Path, folders: list[Path]) -> list[subprocess.CompletedProcess]:
    """Two launchers that meet, as on two machines."""
    endpoint = ("--rdzv-endpoint", f"localhost:{free_port()}")
    command = [sys.executable, "-m", "torch.distributed.run", *TOGETHER, *endpoint, "-m", "finetune", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    agents = [
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for folder in folders
    ]
    return [
        subprocess.CompletedProcess(command, agent.wait(300), text)
        for agent in agents
        for text, _ in [agent.communicate(timeout=300)]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_two_agents_train_and_go_on(machines, tmp_path, shared):
    recipe, folders = machines
    if shared:
        folders = [folders[0]] * 2
    for part in range(2):
        done = two_agents(recipe, folders)
        said = "".join(one.stdout for one in done)
        assert [one.returncode for one in done] == [0, 0], said
        assert ("get copies" in said) == (not shared)
        run = next(folder / "run" for folder in folders if (folder / "run").exists())
        assert sum((folder / "run").exists() for folder in set(folders)) == 1
        if part == 0:
            adapter = back_to(run, 2)
    assert "from step 2" in said and adapter_of(run) == adapter
    done = two_agents(recipe, folders)
    assert [one.returncode for one in done] == [0, 0]
    assert "is finished" in "".join(one.stdout for one in done)


@pytest.mark.slow
def test_a_failure_of_one_agent_ends_the_other(machines, tmp_path):
    recipe, folders = machines
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "train.jsonl"), "train.jsonl"))
    recipe.write_text(recipe.read_text().replace(f"images_root: {ROOT}", "images_root: /"))
    shutil.copy(tmp_path / "train.jsonl", folders[0])
    done = two_agents(recipe, folders)
    assert all(one.returncode != 0 for one in done)
    assert all("train.jsonl" in one.stdout for one in done)
