"""Malformed checkpoints through the real commands: exit code 2, one sentence, no traceback, nothing written."""

import json

import pytest
from adapters_for_tests import make_adapter
from folder_changes import POINTER, Change, copy_tiny, link_out, put, put_json, sharded, without
from recipes_for_tests import finetune, write_recipe

MATRIX = "transformer.h.1.mlp.w1.weight"


def _out_of_the_folder(index, folder):
    index["weight_map"] = {name: f"../{shard}" for name, shard in index["weight_map"].items()}


BROKEN: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (without(MATRIX), f"{MATRIX} is missing from its weights"),
    "hub kernels": (
        put_json("config.json", _attn_implementation="kernels-community/flash-attn"),
        "_attn_implementation is 'kernels-community/flash-attn' instead of",
    ),
    "a billion layers": (put_json("config.json", num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "an LFS pointer": (put("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
    "a damaged setting": (put("generation_config.json", b"[" * 9999), "generation_config.json is not JSON"),
    "a link": (link_out("generation_config.json"), "outside of its folder: put a copy of the file there"),
    "out of the folder": (sharded(_out_of_the_folder), "which is no file of weights beside it"),
}
COMMANDS = ("check", "train", "evaluate", "chat", "merge", "export safetensors", "export nf4", "export qwen2", "bench")
# Each command once, and each kind of damage once; the rest is slow.
DEFAULT = (
    *(("check", "an LFS pointer"), ("train", "hub kernels"), ("evaluate", "a billion layers"), ("chat", "a link")),
    *(("merge", "a tensor is missing"), ("export qwen2", "out of the folder")),
)


def words_of(command: str, folder, tmp_path) -> list[str]:
    out = str(tmp_path / "out")
    match command.split():
        case ["check" | "bench" as name]:
            return [name, str(write_recipe(tmp_path / "recipe", model__path=str(folder)))]
        case ["train"]:
            return [str(write_recipe(tmp_path / "recipe", model__path=str(folder), output=out))]
        case ["evaluate"]:
            rows = [{"question": "What?", "answers": ["this"]}]
            (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
            data = ["--data", str(tmp_path / "rows.jsonl"), "--out", out]
            return ["evaluate", str(folder), "--task", "custom", "--metric", "anls", *data]
        case ["chat"]:
            return ["chat", str(folder), "--once", "hi"]
        case ["merge"]:
            make_adapter(tmp_path / "adapter", own=False)
            return ["merge", str(tmp_path / "adapter"), "--base", str(folder), "--to", out, "--no-check"]
        case ["export", form]:
            return ["export", str(folder), "--to", form, "--out", out]
    raise AssertionError(command)


# A bench draws its own weights, and reads none.
OF_WEIGHTS = ("a tensor is missing", "an LFS pointer", "out of the folder")


def check_command(command: str, damage: str, tmp_path):
    change, message = BROKEN[damage]
    folder = copy_tiny(tmp_path / "checkpoint")
    change(folder)
    words = words_of(command, folder, tmp_path)
    done = finetune(*words, check=False, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") <= 1
    assert not (tmp_path / "out").exists() or command == "train"


@pytest.mark.parametrize(("command", "damage"), DEFAULT)
def test_a_command_refuses(command, damage, tmp_path):
    check_command(command, damage, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "damage"),
    [(command, damage) for command in COMMANDS for damage in BROKEN if command != "bench" or damage not in OF_WEIGHTS],
)
def test_every_command_refuses(command, damage, tmp_path):
    check_command(command, damage, tmp_path)


def test_an_adapter_that_is_an_lfs_pointer(tmp_path):
    make_adapter(tmp_path / "adapter")
    put("adapter_model.safetensors", POINTER)(tmp_path / "adapter")
    for words in (["merge", "--to", str(tmp_path / "out")], ["chat", "--once", "hi"]):
        done = finetune(words[0], tmp_path / "adapter", *words[1:], check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "adapter_model.safetensors is a Git LFS pointer, not the file: run `git lfs pull`" in done.stderr
