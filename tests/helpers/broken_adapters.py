"""Malformed adapter folders, each by one change to a good one."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from broken_checkpoints import damaged_json, short
from folder_changes import (
    POINTER,
    Case,
    Change,
    both,
    cut,
    link_to,
    put,
    put_folder,
    put_json,
    put_pipe,
    remove,
)
from safetensors.torch import load_file, save_file

ADAPTER = "adapter_model.safetensors"
ADAPTER_KEYS: dict[str, tuple[Any, ...]] = {
    "peft_type": (None, 5, "FOO", [], "ADALORA"),
    "r": (0, -1, 1.5, "x", True, [], 10**9),
    "lora_alpha": (0, -1, "x", True, []),
    "lora_dropout": (-1, 1, 2, "x", True),
    "target_modules": (5, ["nothing"], "[", [5], {}),
    "modules_to_save": (5, "wte", [5], {}),
    "exclude_modules": (5, {}),
    "layers_to_transform": ("x", [1.5], {}),
    "rank_pattern": (5, [], {"c_attn": 0}, {"c_attn": "x"}),
    "alpha_pattern": (5, [], {"c_attn": -1}, {"c_attn": "x"}),
    "trainable_token_indices": (5, "x", ["x"], {"wte": 5}),
    "bias": ("x", 5),
    "use_dora": ("x", 5),
    "use_rslora": ("x", 5),
    "init_lora_weights": (5, [], "x"),
    "base_model_name_or_path": (5, [], "", None, "no/where/x"),
    "task_type": ("x", 5),
    "megatron_config": ({"x": 1}, 5),
    "arrow_config": ({"x": 1}, 5),
    "corda_config": (5, "x"),
    "eva_config": (5, "x"),
    "loftq_config": (5, "x"),
    "auto_mapping": (5, "x"),
}


def broken_adapters() -> list[Case]:
    """Changes to a LoRA adapter on the tiny checkpoint that make it one that must be refused."""
    cases: list[Case] = [
        case for name in ("adapter_config.json", "base.json", "qwenvl.json") for case in damaged_json(name)
    ]
    for key, values in ADAPTER_KEYS.items():
        cases += [
            (f"adapter_config.json: {key} is {short(value)}", put_json("adapter_config.json", **{key: value}))
            for value in values
        ]
    for name in (ADAPTER, "adapter_model.bin"):
        first = remove(ADAPTER) if name != ADAPTER else (lambda folder: None)
        for what, content in (
            ("a pointer", POINTER),
            ("empty", b""),
            ("a text", b"hello"),
            ("zeros", bytes(4096)),
            ("a pickle", pickle.dumps({"a": 1})),
        ):
            cases.append((f"{name} is {what}", both(first, put(name, content))))
        cases.append((f"{name} is a folder", both(first, put_folder(name))))
        cases.append((f"{name} is a pipe", both(first, put_pipe(name))))
        cases.append((f"{name} is a link to nowhere", both(first, link_to(name, "nowhere"))))
    cases += [
        ("the adapter's weights are missing", remove(ADAPTER)),
        ("the adapter's weights are cut by half", cut(ADAPTER, lambda size: size // 2)),
        ("the adapter's weights are cut by a byte", cut(ADAPTER, lambda size: size - 1)),
        ("the adapter has no tensors", put(ADAPTER, (2).to_bytes(8, "little") + b"{}")),
        ("the adapter lacks a tensor", _change_adapter(lambda tensors: tensors.__delitem__(min(tensors)))),
        (
            "the adapter has whole numbers",
            _change_adapter(lambda tensors: tensors.update({name: t.to(torch.int8) for name, t in tensors.items()})),
        ),
        (
            "the adapter has another rank",
            _change_adapter(
                lambda tensors: tensors.update({name: t[:2] for name, t in tensors.items() if "lora_A" in name})
            ),
        ),
    ]
    return cases


def _change_adapter(change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    def write(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER)
        (folder / ADAPTER).unlink()
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER)

    return write
