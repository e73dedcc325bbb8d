"""What adapters of other programs may say, without a model."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qwenvl import InputError, MissingFileError
from qwenvl.checkpoint.adapter_config import (
    plain_key,
    read_adapter_config,
    refuse_unknown_keys,
    refuse_unsaved_modules,
)

LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["c_attn"], "init_lora_weights": True}
LORA_KEY = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
TABLES = ["base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight"]


def write_config(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | changes))
    return folder


def write_weights(folder, *names):
    save_file({name: torch.ones(2) for name in names}, folder / "adapter_model.safetensors")


def test_keys_that_served_the_training_alone_are_left_out(tmp_path):
    swift = {"lora_dtype": "fp32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-06}
    assert read_adapter_config(write_config(tmp_path, **swift)) == LORA


@pytest.mark.parametrize(
    "init", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora"], ids=str
)
def test_initialisations_that_can_be_computed_again(tmp_path, init):
    assert read_adapter_config(write_config(tmp_path, init_lora_weights=init))["init_lora_weights"] == init


@pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "corda", "lora_ga", "invented"])
def test_initialisations_that_cannot_are_refused_with_a_remedy(tmp_path, init):
    told = rf"init_lora_weights is {init!r}: .* cannot be computed again.*path_initial_model_for_weight_conversion"
    with pytest.raises(InputError, match=told):
        read_adapter_config(write_config(tmp_path, init_lora_weights=init))


def test_settings_of_another_method_are_not_judged(tmp_path):
    config = {"peft_type": "IA3", "init_lora_weights": "loftq"}
    assert read_adapter_config(write_config(tmp_path, **config)) == LORA | config


def test_unknown_keys_say_nothing_while_they_are_off(tmp_path):
    off = {"a": None, "b": False, "c": 0, "d": [], "e": {}, "f": ""}
    refuse_unknown_keys(tmp_path, LORA | off, LORA)
    with pytest.raises(InputError, match=r"invented is 2, which the installed PEFT does not know.*remove it"):
        refuse_unknown_keys(tmp_path, LORA | off | {"invented": 2}, LORA)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="this is not an adapter"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        (LORA_KEY, LORA_KEY),
        (LORA_KEY.replace(".weight", ".default.weight"), LORA_KEY),
        ("x.wte.modules_to_save.default.weight", "x.wte.weight"),
        ("x.wte.modules_to_save.weight", "x.wte.weight"),
        ("x.c_attn.lora_embedding_A.default", "x.c_attn.lora_embedding_A"),
        ("x.attn_pool.modules_to_save.default.attn.in_proj_weight", "x.attn_pool.attn.in_proj_weight"),
    ],
)
def test_names_in_memory_are_read_as_those_of_files(name, saved):
    assert plain_key(name) == saved


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "beside"])
def test_the_newest_complete_checkpoint_is_named(tmp_path, inside):
    """The published script's folder: LoRA alone at the root, all of it in the checkpoints."""
    config = {"modules_to_save": ["wte", "lm_head"]}
    root = write_config(tmp_path / "run" / "last", **config)
    write_weights(root, LORA_KEY)
    parent = root if inside else root.parent
    for step, names in ((9, [LORA_KEY, *TABLES]), (100, [LORA_KEY, *TABLES]), (200, [LORA_KEY]), (300, [])):
        write_weights(write_config(parent / f"checkpoint-{step}", **config), *names)
    (parent / "checkpoint-400").mkdir()
    with pytest.raises(
        InputError, match=r"wte and lm_head were trained in full.*Use .*checkpoint-100, which has them"
    ):
        refuse_unsaved_modules(root, config, [LORA_KEY])


def test_without_a_complete_checkpoint_there_is_another_remedy(tmp_path):
    (tmp_path / "adapter").mkdir()
    config = {"modules_to_save": ["wte", "lm_head"]}
    with pytest.raises(InputError, match=r"lm_head were trained .*Save the adapter again from"):
        refuse_unsaved_modules(tmp_path / "adapter", config, [LORA_KEY, TABLES[0]])
    refuse_unsaved_modules(tmp_path / "adapter", config, [LORA_KEY, *TABLES])
    refuse_unsaved_modules(tmp_path / "adapter", {"modules_to_save": []}, [LORA_KEY])
