import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn

from finetune.errors import UserError
from finetune.model.adapters import (
    KEYS_OF_PEFT_0_7,
    find_targets,
    put_lora,
    train_in_full,
    trains_embeddings,
    write_plain_config,
)
from finetune.model.components import component_of, count_parameters, table_of_parameters
from qwenvl import QwenVLForConditionalGeneration, load_model


def adapter(**changes):
    defaults = {
        "r": 8,
        "alpha": 16,
        "dropout": 0.0,
        "targets": ["c_attn", "attn.c_proj", "w1", "w2"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "vision_targets": [],
        "layers_to_transform": None,
        "bias": "none",
        "rslora": False,
        "dora": False,
        "init": "default",
        "train_embeddings": False,
    }
    return SimpleNamespace(**{**defaults, **changes})


def freeze(**changes):
    return SimpleNamespace(**{"vision": True, "resampler": True, "language": True, **changes})


def trained_components(model) -> set[str]:
    return {component for component, count in count_parameters(model).items() if count.trained}


def test_components_of_the_checkpoints_names(tiny_model):
    by_component = {}
    for name, _ in tiny_model.named_parameters():
        by_component.setdefault(component_of(name), []).append(name)
    assert sorted(by_component["embeddings"]) == ["lm_head.weight", "transformer.wte.weight"]
    assert len(by_component["resampler"]) == 10 and all("attn_pool" in name for name in by_component["resampler"])
    assert "transformer.visual.proj" in by_component["vision"]
    assert "transformer.ln_f.weight" in by_component["language"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"language": False}, {"language", "embeddings"}),
        ({"resampler": False}, {"resampler"}),
        ({"vision": False}, {"vision"}),
        ({"language": False, "resampler": False}, {"language", "embeddings", "resampler"}),
    ],
)
def test_components_trained_in_full(tiny_model, changes, expected):
    assert trained_components(train_in_full(tiny_model, freeze(**changes))) == expected


def test_everything_frozen_is_refused(tiny_model):
    with pytest.raises(UserError, match="nothing to train"):
        train_in_full(tiny_model, freeze())


@pytest.mark.parametrize(
    ("adapter_changes", "freeze_changes", "embeddings", "trained"),
    [
        ({}, {}, False, {"adapter"}),
        ({}, {}, True, {"adapter", "embeddings"}),
        ({}, {"resampler": False}, False, {"adapter", "resampler"}),
        ({}, {"resampler": False, "vision": False}, False, {"adapter", "resampler", "vision"}),
        ({}, {"vision": False}, False, {"adapter", "vision"}),
        ({"targets": [], "vision_targets": ["in_proj"]}, {}, False, {"adapter"}),
        ({"rslora": True, "dora": True, "init": "gaussian"}, {}, False, {"adapter"}),
    ],
)
def test_what_an_adapter_trains_is_in_its_folder(
    tiny_folder, tmp_path, expected_logits, adapter_changes, freeze_changes, embeddings, trained
):
    """Also in bfloat16, where everything trained is float32; and a reloaded adapter gives the same logits."""
    base = load_model(tiny_folder, dtype="bfloat16")
    model = put_lora(base, adapter(**adapter_changes), freeze(**freeze_changes), embeddings=embeddings)
    assert trained_components(model) == trained
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    changed = expected_logits(model.eval())
    assert not torch.equal(changed, expected_logits(load_model(tiny_folder, dtype="bfloat16")))
    model.save_pretrained(tmp_path)
    assert torch.equal(expected_logits(load_model(tmp_path, dtype="bfloat16")), changed)


@pytest.fixture
def expected_logits(expected):
    def compute(model):
        with torch.no_grad():
            ids = expected["one_image.input_ids"][None]
            return model(input_ids=ids, pixel_values=expected["pixel_values"][:1]).logits

    return compute


def lora_modules(model) -> set[str]:
    matched = [name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name]
    return {name.removeprefix("base_model.model.") for name in matched}


def test_language_targets_stay_out_of_the_vision_tower(tiny_model):
    """`mlp.c_proj` is the name of linears on both sides."""
    model = put_lora(tiny_model, adapter(targets=["mlp.c_proj"]), freeze(), embeddings=False)
    assert lora_modules(model) == {"transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"}


def test_vision_targets_stay_in_it(tiny_model):
    model = put_lora(tiny_model, adapter(targets=[], vision_targets=["mlp.c_proj"]), freeze(), embeddings=False)
    blocks = "transformer.visual.transformer.resblocks"
    assert lora_modules(model) == {f"{blocks}.0.mlp.c_proj", f"{blocks}.1.mlp.c_proj"}


def test_published_targets_are_kept_as_they_are_written(tiny_model):
    model = put_lora(tiny_model, adapter(), freeze(), embeddings=False)
    assert set(model.peft_config["default"].target_modules) == {"c_attn", "attn.c_proj", "w1", "w2"}


@pytest.mark.parametrize("target", ["q_proj", "attn", "attn.in_proj", "ln_1", ""])
def test_an_unmatched_target_lists_what_there_is(tiny_model, target):
    with pytest.raises(UserError, match=r"adapter\.targets.*matches nothing.*attn\.c_attn, .*mlp\.w2"):
        find_targets(tiny_model, ["c_attn", target], "transformer.h.", "adapter.targets")


def test_contradictions_are_refused(tiny_model):
    with pytest.raises(UserError, match=r"freeze\.language"):
        put_lora(tiny_model, adapter(), freeze(language=False), embeddings=False)
    with pytest.raises(UserError, match="choose one"):
        put_lora(
            tiny_model,
            adapter(vision_targets=["in_proj"]),
            freeze(vision=False, resampler=False),
            embeddings=False,
        )


def test_an_orthogonal_start_needs_an_even_rank(tiny_model):
    with pytest.raises(UserError, match=r"adapter\.init: orthogonal needs an even adapter\.r, not 7"):
        put_lora(tiny_model, adapter(r=7, init="orthogonal"), freeze(), embeddings=False)


@pytest.mark.parametrize(("chat_format", "expected"), [("raw", True), ("chatml", False)])
def test_auto_embeddings_come_from_the_checkpoint(tiny_model, chat_format, expected):
    tiny_model.generation_config.chat_format = chat_format
    tiny_model.config._name_or_path = "a-chat-model-by-its-path"
    assert trains_embeddings("auto", tiny_model.generation_config) is expected
    assert trains_embeddings(not expected, tiny_model.generation_config) is not expected


def test_auto_embeddings_of_a_checkpoint_that_does_not_say(tiny_model):
    del tiny_model.generation_config.chat_format
    with pytest.raises(UserError, match="train_embeddings: auto"):
        trains_embeddings("auto", tiny_model.generation_config)


def test_the_table_says_what_is_trained(tiny_model):
    counts = count_parameters(put_lora(tiny_model, adapter(), freeze(), embeddings=False))
    lines = list(table_of_parameters(counts))
    assert [line.split()[0] for line in lines] == ["vision", "resampler", "language", "embeddings", "adapter"]
    assert "frozen" in lines[0] and "trained" in lines[4]
    lora = sum(p.numel() for n, p in tiny_model.named_parameters() if "lora" in n)
    assert counts["adapter"].trained == counts["adapter"].total == lora


def test_copies_that_peft_trains_are_counted_once(tiny_model):
    before = count_parameters(tiny_model)["embeddings"].total
    model = put_lora(tiny_model, adapter(), freeze(), embeddings=True)
    assert count_parameters(model)["embeddings"].total == before
    assert isinstance(model.base_model.model, QwenVLForConditionalGeneration)
    assert isinstance(model.base_model.model.lm_head, nn.Module)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True, "use_rslora": True}, {"modules_to_save": ["wte"], "exclude_modules": ["w1"]}],
    ids=["lora", "dora", "excluded"],
)
def test_a_saved_configuration_has_what_it_says_and_nothing_else(tmp_path, monkeypatch, settings):
    """In the keys of PEFT 0.7, and in others only where they are not at PEFT's defaults."""
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    config = LoraConfig(r=4, target_modules=["w2", "c_attn", "w1"], base_model_name_or_path="base", **settings)
    config.save_pretrained(str(tmp_path))
    write_plain_config(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    others = settings.keys() - KEYS_OF_PEFT_0_7
    assert written.keys() == KEYS_OF_PEFT_0_7 | others
    assert written["target_modules"] == ["c_attn", "w1", "w2"]
    read = LoraConfig.from_pretrained(str(tmp_path)).to_dict()
    assert read == config.to_dict() | {"base_model_name_or_path": str(tmp_path / "base")}


@pytest.mark.parametrize(
    ("init", "written"), [("orthogonal", True), ("gaussian", True), ("pissa", "pissa"), (False, False)], ids=str
)
def test_an_initialisation_is_saved_where_the_weights_depend_on_it(tmp_path, init, written):
    LoraConfig(init_lora_weights=init, base_model_name_or_path="owner/name").save_pretrained(str(tmp_path))
    write_plain_config(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == written and config["base_model_name_or_path"] == "owner/name"
