"""Nothing random in a loaded model: every loader refuses a checkpoint whose tensors are not those of its config."""

import json
import sys

import pytest
import torch
from folder_changes import copy_tiny, put_json, with_tensor, without
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from qwenvl import InputError, QwenVLConfig, QwenVLForConditionalGeneration, QwenVLModel, load_model
from qwenvl.model.layout import expected_tensors
from qwenvl.model.quantization import nf4_config
from qwenvl.model.whole import require_whole

LOADERS = {
    "load_model": load_model,
    "in 4 bits": lambda folder: load_model(folder, quantization="nf4"),
    "without embeddings": lambda folder: load_model(folder, embeddings_on_cpu=True),
    "the class": QwenVLForConditionalGeneration.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "AutoModelForImageTextToText": AutoModelForImageTextToText.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "the decoder": QwenVLModel.from_pretrained,
    "a sub-folder": lambda folder: QwenVLForConditionalGeneration.from_pretrained(
        folder.parent, subfolder=folder.name
    ),
    "other sizes allowed": lambda folder: QwenVLForConditionalGeneration.from_pretrained(
        folder, ignore_mismatched_sizes=True
    ),
}
MATRIX = "transformer.h.1.mlp.w1.weight"


@pytest.fixture
def copy(tmp_path):
    return copy_tiny(tmp_path / "copy")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", [MATRIX, "transformer.visual.attn_pool.pos_embed"])
def test_a_missing_tensor_is_refused_by_every_loader(copy, loader, name):
    without(name)(copy)
    with pytest.raises(InputError, match=rf"{name.removeprefix('transformer.')}.* missing from its weights"):
        LOADERS[loader](copy)


@pytest.mark.parametrize("loader", ["load_model", "AutoModelForCausalLM", "a sub-folder", "other sizes allowed"])
def test_a_misshapen_tensor_is_refused(copy, loader):
    with_tensor(MATRIX, lambda tensor: tensor[:-1])(copy)
    with pytest.raises((InputError, RuntimeError), match=r"shape|mismatch") as refused:
        LOADERS[loader](copy)
    assert loader == "a sub-folder" or isinstance(refused.value, InputError)


def test_layers_that_the_config_does_not_know_are_refused(copy):
    put_json("config.json", num_hidden_layers=1)(copy)
    with pytest.raises(InputError, match=r"transformer\.h\.1\.\S+ is no part of the model .* \(8 such tensors\)"):
        load_model(copy)


def test_buffers_that_older_programs_saved_are_no_fault(copy):
    with_tensor(MATRIX, lambda tensor: tensor[0], "transformer.rotary_emb.inv_freq")(copy)
    assert len(require_whole(copy)) == 62
    load_model(copy)


def test_a_new_model_is_made_from_a_config(tiny_folder):
    config = QwenVLConfig.from_pretrained(tiny_folder)
    QwenVLForConditionalGeneration(config)
    state = load_file(tiny_folder / "model.safetensors")
    model = QwenVLForConditionalGeneration.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def test_the_layout_is_the_models(tiny_folder, pytestconfig):
    text_only = QwenVLConfig.from_pretrained(tiny_folder)
    text_only.visual = None
    wide = QwenVLConfig.from_pretrained(tiny_folder)
    wide.visual = {**wide.visual, "width": 256}  # no kv_proj
    for config in (QwenVLConfig.from_pretrained(tiny_folder), text_only, wide):
        with torch.device("meta"):
            model = QwenVLForConditionalGeneration(config)
        expected = list(expected_tensors(config))
        assert [tensor.name for tensor in expected] == list(model.state_dict())
        assert {tensor.name: tensor.shape for tensor in expected} == {
            name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
        }
        linears = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
        assert {tensor.name for tensor in expected if tensor.linear} == linears


def test_the_layout_of_the_published_model(pytestconfig):
    layout = json.loads((pytestconfig.rootpath / "tests" / "data" / "checkpoint_layout.json").read_text())["tensors"]
    assert {tensor.name: list(tensor.shape) for tensor in expected_tensors(QwenVLConfig())} == layout


def test_absurd_sizes_end_at_the_first_tensor_that_is_not_there(copy):
    put_json("config.json", num_hidden_layers=1000)(copy)
    with pytest.raises(InputError, match=r"transformer\.h\.2\.ln_1\.weight is missing"):
        load_model(copy)
    put_json("config.json", num_hidden_layers=10**9)(copy)
    with pytest.raises(InputError, match=r"num_hidden_layers is 1000000000, which is more than any model has"):
        load_model(copy)


@pytest.mark.parametrize("damage", ["no config", "no state", "16 bits"])
def test_4_bit_codes_that_cannot_be_read_are_refused(copy, damage, tmp_path):
    folder = tmp_path / "nf4"
    load_model(copy, quantization="nf4").save_pretrained(folder)
    require_whole(folder)
    if damage == "no config":
        put_json("config.json", quantization_config=None)(folder)
        expected = r"is of type uint8, as in quantised checkpoints, but config\.json says nothing"
    elif damage == "no state":
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"{MATRIX}.absmax"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        expected = rf"{MATRIX}\.absmax is missing"
    else:
        put_json("config.json", quantization_config=nf4_config(("language",)).to_dict())(copy)
        folder, expected = copy, r"is float32 of shape .*, but by config\.json it is in 4 bits"
    with pytest.raises(InputError, match=expected):
        load_model(folder)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A `kernels` package that leaves a mark when it is imported."""
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    return tmp_path / "ran"


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_folder_does_not_choose_the_attention(copy, mark, key):
    put_json("config.json", **{key: "flash_attention_2"})(copy)
    for load in (load_model, QwenVLForConditionalGeneration.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert load(copy).config._attn_implementation == "sdpa"
    put_json("config.json", **{key: "kernels-community/flash-attn"})(copy)
    for load in (load_model, AutoModelForCausalLM.from_pretrained, QwenVLConfig.from_pretrained):
        with pytest.raises(InputError, match=rf"{key} is 'kernels-community/flash-attn' instead of eager, sdpa"):
            load(copy)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["kernels-community/flash-attn", "a/b:c", "nonsense", "paged|sdpa"])
def test_a_program_can_only_ask_for_what_is_here(tiny_folder, tiny_model, mark, name):
    with pytest.raises(InputError, match="attention must be computed by one of eager, sdpa, varlen"):
        QwenVLForConditionalGeneration.from_pretrained(tiny_folder, attn_implementation=name)
    with pytest.raises(InputError, match="attention must be computed by"):
        tiny_model.set_attn_implementation(name)
    with pytest.raises(InputError, match="attention must be computed by"):
        AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation=name)
    assert not mark.exists()


def test_flash_attention_needs_its_package_and_never_the_hub(tiny_folder, mark, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    with pytest.raises(InputError, match=r"flash_attention_2 needs .* flash-attn"):
        QwenVLForConditionalGeneration.from_pretrained(tiny_folder, attn_implementation="flash_attention_2")
    with pytest.raises(InputError, match="use_kernels fetches code from the hub"):
        QwenVLForConditionalGeneration.from_pretrained(tiny_folder, use_kernels=True)
    assert not mark.exists()


def test_code_in_the_folder_is_not_run(copy, mark):
    for name in ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py"):
        (copy / name).write_text(f"open({str(mark)!r}, 'w')\n")
    put_json("config.json", tokenizer_class="QWenTokenizer")(copy)
    load_model(copy)
    for trust in (False, True):
        AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=trust)
    assert not mark.exists()
