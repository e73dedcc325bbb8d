import json

import pytest
import torch
from adapters_for_tests import KINDS, TINY, edit_config, make_adapter
from safetensors.torch import load_file, save_file

from finetune.errors import InputError
from finetune.merge.adapter_weights import read_adapter
from qwenvl.checkpoint.checkpoint_files import locate_tensors

BASE = locate_tensors(TINY)
WEIGHTS = "adapter_model.safetensors"
A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
B = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"


@pytest.fixture
def adapter(tmp_path):
    make_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, edit_weights):
    weights = load_file(folder / WEIGHTS)
    edit_weights(weights)
    save_file(weights, folder / WEIGHTS)


def refused(folder, match):
    with pytest.raises(InputError, match=match):
        read_adapter(folder, BASE)


def test_every_key_has_its_place(adapter):
    read = read_adapter(adapter, BASE)
    assert read.keys == len(load_file(adapter / WEIGHTS)) == 16
    layers = [f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "attn.c_proj")]
    layers += [f"transformer.h.{layer}.mlp.{name}" for layer in (0, 1) for name in ("w1", "w2")]
    assert set(read.changes) == {f"{name}.weight" for name in layers}
    assert read.kinds() == {"LoRA": 8}
    assert {change.low_rank.scale for change in read.changes.values()} == {8 / 4}


def test_the_hash_is_of_the_content(adapter, tmp_path):
    adapter.rename(tmp_path / "moved")
    first = read_adapter(tmp_path / "moved", BASE).sha256()
    assert first == read_adapter(tmp_path / "moved", BASE).sha256()
    edit_config(tmp_path / "moved", lora_alpha=9)
    assert first != read_adapter(tmp_path / "moved", BASE).sha256()


def test_a_layer_that_a_regular_expression_names_is_missed(tmp_path):
    folder = tmp_path / "adapter"
    make_adapter(folder, **KINDS["gaussian by regex"])
    assert set(read_adapter(folder, BASE).changes) == {
        f"transformer.h.1.{name}.weight" for name in ("attn.c_attn", "mlp.w2")
    }
    edit(folder, lambda weights: [weights.pop(key) for key in list(weights) if "w2" in key])
    refused(folder, r"says that transformer.h.1.mlp.w2 has LoRA")


KEYS_OF = ("lora", "dora", "embeddings in full", "resampler in full", "embedding lora", "token rows", "lora bias")


@pytest.mark.parametrize("kind", KEYS_OF)
def test_each_key_that_is_dropped_renamed_nan_or_misshapen_is_named(tmp_path, kind):
    folder = tmp_path / "adapter"
    make_adapter(folder, **KINDS[kind])
    weights = load_file(folder / WEIGHTS)
    assert len(weights) > 5
    for key, tensor in weights.items():
        named = key.removeprefix("base_model.model.")
        module = named.rsplit(".lora_", 1)[0].removesuffix(".trainable_tokens_delta").removesuffix(".token_adapter")
        others = {name: value for name, value in weights.items() if name != key}
        nan = tensor.clone()
        nan.view(-1)[-1] = torch.nan
        for damage, changed, place in [
            ("dropped", others, module.removeprefix("transformer.").removesuffix(".weight")),
            ("renamed", others | {key.replace("base_model.model.", "base_model.model.x"): tensor}, named[4:]),
            ("without prefix", others | {named: tensor}, named),
            ("not a number", others | {key: nan}, named),
            ("infinite", others | {key: torch.full_like(tensor, torch.inf)}, named),
            ("misshapen", others | {key: tensor[:-1].clone()}, module),
            ("of another rank", others | {key: tensor[None].clone()}, module),
            ("whole numbers", others | {key: torch.ones(tensor.shape, dtype=torch.int32)}, named),
        ]:
            # An embedding that has LoRA is saved with its table, which is the base's: it may be missing.
            if damage == "dropped" and ".base_layer." in key and kind == "embedding lora":
                continue
            save_file(changed, folder / WEIGHTS)
            with pytest.raises(InputError) as told:
                read_adapter(folder, BASE)
            assert place.replace(".base_layer", "") in str(told.value).replace(".base_layer", ""), (damage, key)


def test_a_pair_that_is_missing_whole_is_named(adapter):
    def drop(weights):
        del weights[A], weights[B]

    edit(adapter, drop)
    refused(adapter, r"transformer\.h\.0\.attn\.c_attn has LoRA \(target_modules\), but the adapter lacks")


def test_two_spellings_of_one_key_are_refused(tmp_path):
    make_adapter(tmp_path, **KINDS["dora"])
    edit(tmp_path, lambda weights: weights.update({A.replace("A.weight", "magnitude_vector.weight"): torch.ones(768)}))
    refused(tmp_path, "magnitude_vector.* is there twice, in two spellings")


def test_what_was_not_said_to_be_trained_is_refused(adapter):
    key = "base_model.model.transformer.ln_f.weight"
    edit(adapter, lambda weights: weights.update({key: torch.ones(256)}))
    refused(adapter, r"transformer\.ln_f\.weight is not among what adapter_config\.json says")


def test_a_module_trained_in_full_that_was_not_saved_is_named(adapter):
    edit_config(adapter, modules_to_save=["wte", "lm_head"])
    refused(adapter, r"wte and lm_head were trained in full \(modules_to_save\), but the adapter's file lacks")


def test_weights_of_another_rank_than_the_settings_are_named(adapter):
    edit_config(adapter, r=8)
    refused(adapter, r"lora_A\.weight has shape \[4, 256\]; by rank \(8\) and base it should have \[8, 256\]")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3; only LORA"),
        ({"r": 0}, "r is 0 instead of a positive whole number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16' instead of a positive number"),
        ({"init_lora_weights": "pissa_niter_4"}, "cannot be computed again"),
        ({"init_lora_weights": "loftq"}, "save_pretrained with path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"target_parameters": ["w"]}, "target_parameters is"),
        ({"invented_in_2030": 3}, "invented_in_2030 is 3, which the installed PEFT does not know"),
        ({"use_dora": True}, r"lora_magnitude_vector is missing \(use_dora is true\)"),
        ({"trainable_token_indices": [1]}, "lacks base_model.model.transformer.wte.token_adapter"),
        ({"bias": "all"}, "bias is all, but the adapter lacks"),
    ],
)
def test_settings_that_are_not_understood_are_refused_by_name(adapter, changes, match):
    edit_config(adapter, **changes)
    refused(adapter, match)


def test_settings_without_effect_are_accepted(adapter):
    edit_config(adapter, use_qalora=False, invented_in_2030=None, qalora_group_size=16, runtime_config={"x": 1})
    assert read_adapter(adapter, BASE).keys == 16


def test_keys_of_another_program_that_served_the_training_are_accepted(adapter):
    before = read_adapter(adapter, BASE)
    edit_config(adapter, lora_dtype="fp32", lorap_lr_ratio=16.0, lorap_emb_lr=1e-06)
    assert read_adapter(adapter, BASE).changes == before.changes


def test_names_of_modules_in_memory_are_understood(tmp_path):
    make_adapter(tmp_path, **KINDS["embeddings in full"])
    before = read_adapter(tmp_path, BASE)
    weights = load_file(tmp_path / WEIGHTS)
    ends = {True: ".default.weight", False: ".modules_to_save.default.weight"}
    save_file(
        {name.removesuffix(".weight") + ends[".lora_" in name]: value for name, value in weights.items()},
        tmp_path / WEIGHTS,
    )
    after = read_adapter(tmp_path, BASE)
    assert after.changes.keys() == before.changes.keys() and after.kinds() == before.kinds()
    assert torch.equal(after.changes["lm_head.weight"].replaced.read(), weights["base_model.model.lm_head.weight"])


def test_a_magnitude_without_dora_is_refused(tmp_path):
    make_adapter(tmp_path, **KINDS["dora"])
    edit_config(tmp_path, use_dora=False)
    refused(tmp_path, "lora_magnitude_vector is there, but use_dora is not true")


def test_dora_on_an_embedding_is_refused(tmp_path):
    make_adapter(tmp_path, target_modules=["wte"], use_dora=True)
    refused(tmp_path, "DoRA on an embedding")


def test_a_row_that_the_table_lacks_is_refused(tmp_path):
    make_adapter(tmp_path, **KINDS["token rows"])
    edit_config(tmp_path, trainable_token_indices=[3, 514, 5000])
    refused(tmp_path, "trainable_tokens_delta has shape")


def test_files_that_are_missing_or_damaged_are_named(adapter):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read: it is damaged"):
        read_adapter(adapter, BASE)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="the adapter's weights are missing"):
        read_adapter(adapter, BASE)
    (adapter / "adapter_config.json").write_text("[")
    refused(adapter, r"adapter_config\.json is not JSON")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="this is not an adapter"):
        read_adapter(adapter, BASE)


def test_pickled_weights_are_read_alike_and_run_nothing(adapter):
    weights = load_file(adapter / WEIGHTS)
    changes = read_adapter(adapter, BASE).changes
    (adapter / WEIGHTS).unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    pickled = read_adapter(adapter, BASE).changes
    assert pickled.keys() == changes.keys()
    for name, change in pickled.items():
        assert torch.equal(change.low_rank.a.read(), weights[f"base_model.model.{name[:-7]}.lora_A.weight"])


def test_config_is_kept_as_it_is(adapter):
    assert read_adapter(adapter, BASE).config == json.loads((adapter / "adapter_config.json").read_text())
