"""Adapters of every kind on the tiny checkpoint, gone on from."""

import json
import shutil

import pytest
import torch
from adapters_for_tests import KINDS, TINY, edit_config, make_adapter
from records_for_tests import note_base
from safetensors.torch import load_file, save_file

from finetune.errors import InputError, UserError
from finetune.model.base import build_without_weights, find_base, make_trainable
from finetune.model.components import count_parameters
from finetune.model.given_adapter import find_given_adapter, load_given_weights
from finetune.recipe import parse_recipe
from qwenvl import load_model
from qwenvl.base_check import identify_base
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.views import Views

TEXT = f"model: {{path: {TINY}}}\ndata: {{train: {{path: a.jsonl, format: messages}}}}\noutput: run"
WEIGHTS = "adapter_model.safetensors"
NOT_TRAINED_HERE = {
    "convolution lora": "conv1, which is no linear layer",
    "convolution dora": "conv1, which is no linear layer",
    "embedding lora": "wte, which is no linear layer",
    "token rows": "trainable_token_indices is",
    "token rows of both": "trainable_token_indices is",
    "lora bias": "lora_bias is true",
}
TRAINED_BESIDE = {"resampler in full": ["freeze.resampler=false"], "vision in full": ["freeze.vision=false"]}


def recipe_of(folder, *changes):
    return parse_recipe(TEXT, [f"adapter.from={folder}", *changes])


def found(folder, *changes):
    recipe = recipe_of(folder, *changes)
    return find_given_adapter(recipe, find_base(recipe.model))


def gone_on(recipe, given, **loading):
    model = make_trainable(load_model(TINY, **loading), recipe)
    load_given_weights(model, given)
    return model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given") / "adapter"
    make_adapter(folder)
    return folder


@pytest.fixture
def copied(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "adapter")


LONGER = ("rslora", "dora rslora", "vision in full", "biases of lora", "olora", "orthogonal")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] if kind in LONGER else [])
        for kind in KINDS
        if kind not in NOT_TRAINED_HERE
    ],
)
def test_training_begins_where_the_adapter_ended(tmp_path, expected, kind):
    trained = make_adapter(tmp_path / "adapter", **KINDS[kind])
    recipe, given = found(tmp_path / "adapter", *TRAINED_BESIDE.get(kind, []))
    model = gone_on(recipe, given)
    inputs = {"input_ids": expected["one_image.input_ids"][None], "pixel_values": expected["pixel_values"][:1]}
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, trained(**inputs).logits)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert count_parameters(build_without_weights(recipe, find_base(recipe.model))) == count_parameters(model)
    assert parse_recipe(recipe.to_yaml()) == recipe
    again, _ = found(tmp_path / "adapter", *TRAINED_BESIDE.get(kind, []), f"adapter.r={recipe.adapter.r}")
    assert again == recipe


@pytest.mark.parametrize("kind", NOT_TRAINED_HERE)
def test_what_is_not_trained_here_is_refused(tmp_path, kind):
    make_adapter(tmp_path / "adapter", **KINDS[kind])
    with pytest.raises(UserError, match=rf"adapter.from: .*{NOT_TRAINED_HERE[kind]}.*merge it into its base"):
        found(tmp_path / "adapter")


def test_a_half_precision_adapter_is_trained_in_float32(copied):
    save_file({name: tensor.bfloat16() for name, tensor in load_file(copied / WEIGHTS).items()}, copied / WEIGHTS)
    recipe, given = found(copied)
    weights = dict(gone_on(recipe, given, dtype="bfloat16").named_parameters())
    for name, stored in load_file(copied / WEIGHTS).items():
        there = weights[name.replace(".weight", ".default.weight")]
        assert there.dtype == torch.float32 and torch.equal(there, stored.float())


def test_pickled_weights_and_names_in_memory(copied):
    """As the published script and ms-swift leave them."""
    recipe, given = found(copied)
    logits = gone_on(recipe, given).eval()(input_ids=torch.arange(20)[None]).logits
    weights = {
        name.replace(".weight", ".default.weight"): value for name, value in load_file(copied / WEIGHTS).items()
    }
    torch.save(weights, copied / "adapter_model.bin")
    (copied / WEIGHTS).unlink()
    (copied / "qwenvl.json").unlink()
    recipe, given = found(copied)
    assert torch.equal(gone_on(recipe, given).eval()(input_ids=torch.arange(20)[None]).logits, logits)
    assert "The adapter says nothing of the weights" in given.notes(recipe, find_base(recipe.model), None, None)[0]


def test_a_base_in_4_bits(copied):
    recipe, given = found(copied, "model.quantization=nf4")
    model = gone_on(recipe, given, quantization="nf4", device_map="cpu")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    counted = count_parameters(build_without_weights(recipe, find_base(recipe.model)))
    assert counted == count_parameters(model) and counted["adapter"].trained > 0


def test_keys_that_are_left_out_are_the_adapters(tmp_path):
    make_adapter(
        tmp_path / "a", r=2, lora_alpha=6, lora_dropout=0.25, use_rslora=True, use_dora=True, bias="lora_only"
    )
    adapter = found(tmp_path / "a")[0].adapter
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.rslora, adapter.dora, adapter.bias) == (
        *(2, 6, 0.25),
        *(True, True, "lora_only"),
    )
    assert found(tmp_path / "a", "adapter.dropout=0.1")[0].adapter.dropout == 0.1  # of the training to come


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["adapter.r=8"], r"adapter.r: 8 disagrees with the adapter in .* which has r: 4, rank_pattern: {}"),
        (["adapter.alpha=16"], r"adapter.alpha: 16 disagrees .* alpha: 8"),
        (["adapter.rank_pattern={w1: 2}"], r"adapter.rank_pattern: {'w1': 2} disagrees"),
        (["adapter.targets=[c_attn]"], r"adapter.targets: \[c_attn\] disagrees .* targets: \[attn.c_proj, c_attn, w1"),
        (["adapter.layers_to_transform=[1]"], r"layers_to_transform: \[1\] disagrees"),
        (["adapter.vision_targets=[in_proj]"], r"vision_targets: \[in_proj\] disagrees"),
        (["adapter.dora=true"], r"adapter.dora: true disagrees .* has dora: false"),
        (["adapter.rslora=true"], r"adapter.rslora: true disagrees"),
        (["adapter.bias=all"], r"adapter.bias: all disagrees .* has bias: none"),
        (["adapter.init=pissa"], r"adapter.init: pissa disagrees .* has init: default"),
        (["adapter.train_embeddings=true"], r"train_embeddings: true disagrees .* has train_embeddings: false"),
        (["freeze.resampler=false"], r"freeze.resampler: false, and the adapter in .* has no resampler of its own"),
        (["freeze.vision=false"], r"freeze.vision: false, and the adapter in .* has no vision of its own"),
    ],
)
def test_keys_that_disagree_are_refused(adapter, changes, message):
    with pytest.raises(UserError, match=message):
        found(adapter, *changes)


def test_keys_that_agree_in_other_words(tmp_path):
    make_adapter(tmp_path / "a", **KINDS["one layer"])
    recipe, given = found(
        tmp_path / "a", "adapter.targets=[w2,w1,c_attn,attn.c_proj]", "adapter.layers_to_transform=[1]"
    )
    assert recipe.adapter.layers_to_transform == (1,)
    assert count_parameters(gone_on(recipe, given))["adapter"].trained == sum(
        tensor.numel() for tensor in load_file(tmp_path / "a" / WEIGHTS).values()
    )


def test_a_part_trained_in_full_must_be_trained_on(tmp_path):
    make_adapter(tmp_path / "a", modules_to_save=["attn_pool"])
    with pytest.raises(
        UserError, match=r"freeze.resampler: true, and .* has the resampler trained in full: set freeze"
    ):
        found(tmp_path / "a")
    make_adapter(tmp_path / "b", modules_to_save=["wte"])
    with pytest.raises(UserError, match=r"trained transformer.wte in full and not lm_head"):
        found(tmp_path / "b")
    make_adapter(tmp_path / "c", modules_to_save=["ln_f"])
    with pytest.raises(UserError, match=r"trained transformer.ln_f in full, which is not trained beside LoRA here"):
        found(tmp_path / "c")


def test_what_does_not_go_with_the_recipe_is_refused(tmp_path):
    make_adapter(tmp_path / "a", init_lora_weights="pissa")
    with pytest.raises(UserError, match=r"adapter.init, model.quantization: pissa starts from the base's weights"):
        found(tmp_path / "a", "model.quantization=nf4")


KEY = "base_model.model.transformer.h.1.mlp.w2.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(KEY), "transformer.h.1.mlp.w2.lora_B.weight is missing"),
        (
            lambda weights: weights.update({KEY.replace("h.1", "h.2"): weights[KEY].clone()}),
            "h.2.mlp.w2.*has no place",
        ),
        (
            lambda weights: weights.update({KEY: weights[KEY][:-1].clone()}),
            r"w2.lora_B.weight has shape \[\d+, 4\], and",
        ),
        (lambda weights: weights[KEY].view(-1)[-1:].fill_(torch.nan), "w2.lora_B.weight holds NaN or infinities"),
    ],
)
def test_every_tensor_has_its_place(copied, change, message):
    weights = load_file(copied / WEIGHTS)
    change(weights)
    save_file(weights, copied / WEIGHTS)
    with pytest.raises(UserError, match=message):
        found(copied)


def test_settings_that_the_weights_do_not_have(copied):
    edit_config(copied, r=8)
    with pytest.raises(UserError, match=r"has shape \[4, \d+\], and the model has \[8, \d+\]"):
        found(copied)


def test_another_base_is_refused(copied):
    identity = identify_base(TINY)
    _, given = found(copied)
    given.refuse_other_base(str(TINY), identity)
    content = json.loads((copied / "qwenvl.json").read_text())
    content["base"]["weights"] = "0" * 32
    (copied / "qwenvl.json").write_text(json.dumps(content))
    _, given = found(copied)
    with pytest.raises(UserError, match=r"was trained on .*, from which .* differs: other weights"):
        given.refuse_other_base(str(TINY), identity)


def test_what_is_no_adapter(tmp_path):
    with pytest.raises(UserError, match=r"adapter.from: .* is a whole checkpoint: give it as model.path"):
        found(TINY)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"no adapter yet, as the run did not finish. Give one of its checkpoints"):
        found(tmp_path)
    with pytest.raises(InputError, match=r"adapter.from: .*no adapter_config.json here"):
        found(tmp_path / "nowhere")


def test_what_it_was_trained_as_is_said(copied):
    recipe, given = found(copied)
    base = find_base(recipe.model)
    note_base(copied, TINY, identify_base(TINY))
    assert given.notes(recipe, base, None, None) == ()
    known = ModelRecord(given.record.base, labels="structure", quantize=("language",), views=Views(), grounding=True)
    given = type(given)(copied, "", known)
    said = " ".join(given.notes(recipe, base, None, "Be brief."))
    for part in (
        "4 bits: language, now none",
        "images as: ",
        "system message: none, now Be brief.",
        "labels: structure",
    ):
        assert part in said
    assert "(data.grounding): true, now false" in said


def test_the_hash_is_of_the_content(adapter, copied):
    assert found(adapter)[1].sha256 == found(copied)[1].sha256
    edit_config(copied, lora_dropout=0.5)
    assert found(adapter)[1].sha256 != found(copied)[1].sha256
