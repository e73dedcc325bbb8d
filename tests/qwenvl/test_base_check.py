"""A base is the one that an adapter was trained on, or what differs is named."""

import json
import shutil

import pytest
from changed_bases import edit_json, flip_a_bit
from records_for_tests import note_base
from safetensors.torch import load_file, save_file

from qwenvl import InputError, QwenVLConfig, load_processor
from qwenvl.base_check import check_base, identify_base
from qwenvl.checkpoint.fingerprint import sampled_fingerprint, weights_fingerprint
from qwenvl.checkpoint.identity import BaseIdentity, differences, identity_from_json, identity_to_json
from qwenvl.model.configuration import LANGUAGE_SIZES, VISUAL_NUMBERS


@pytest.fixture
def base(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def known(tiny_folder):
    return identify_base(tiny_folder)


def test_what_means_nothing_does_not_count(base, known):
    edit_json(
        base / "config.json",
        architectures=["Other"],
        torch_dtype="bfloat16",
        transformers_version="5.0",
        auto_map={"AutoConfig": "x.Y"},
        fp16=True,
        use_flash_attn="auto",
        onnx_safe=None,
        initializer_range=0.5,
        use_cache=False,
        max_position_embeddings=99,
    )
    edit_json(base / "generation_config.json", max_new_tokens=5)
    vocabulary = (base / "qwen.tiktoken").read_bytes()
    (base / "qwen.tiktoken").write_bytes(vocabulary.replace(b"\n", b"\r\n"))
    assert identify_base(base) == known


def test_a_key_that_is_absent_is_its_default(base):
    values = {key: QwenVLConfig.__dataclass_fields__[key].default for key in ("rotary_emb_base", "use_logn_attn")}
    edit_json(base / "config.json", **values, visual={"n_queries": 256})
    written = identify_base(base)
    edit_json(base / "config.json", rotary_emb_base=None, use_logn_attn=None)
    config = json.loads((base / "config.json").read_text())
    del config["visual"]["n_queries"]
    (base / "config.json").write_text(json.dumps(config))
    assert identify_base(base) == written
    edit_json(base / "config.json", rotary_emb_base=10000.0)
    assert differences(written, identify_base(base)) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seq_length": 512}, "config.json: seq_length was 700, is 512"),
        ({"use_dynamic_ntk": False}, "config.json: use_dynamic_ntk was true, is false"),
        ({"use_logn_attn": False}, "config.json: use_logn_attn was true, is false"),
        ({"rotary_emb_base": 20000}, "config.json: rotary_emb_base was 10000, is 20000"),
        ({"layer_norm_epsilon": 1e-5}, "config.json: layer_norm_epsilon was 1e-06, is 1e-05"),
        ({"emb_dropout_prob": 0.5}, "config.json: emb_dropout_prob was 0.0, is 0.5"),
        ({"visual": {"image_size": 140}}, "config.json: visual.image_size was 112, is 140"),
        ({"visual": {"heads": 2}}, "config.json: visual.heads was 4, is 2"),
    ],
)
def test_an_edited_config_is_named(base, known, tmp_path, change, line):
    edit_json(base / "config.json", **change)
    assert differences(known, identify_base(base)) == [line]
    note_base(tmp_path, "there", known)
    with pytest.raises(InputError, match=r"was trained on there, from which .*base differs: config\.json: "):
        check_base(tmp_path, base)


def test_all_sizes_of_a_config_count(known):
    assert {*LANGUAGE_SIZES} - {"max_position_embeddings"} < known.computation.keys()
    assert {f"visual.{key}" for key in VISUAL_NUMBERS} < known.computation.keys()


def test_the_image_processors_own_size_counts(base, known):
    load_processor(base).save_pretrained(base)
    assert differences(known, identify_base(base)) == []
    file = next(
        base / name for name in ("preprocessor_config.json", "processor_config.json") if (base / name).exists()
    )
    file.write_text(file.read_text().replace("112", "140"))
    assert differences(known, identify_base(base)) == ["preprocessor_config.json: size was 112, is 140"]


def test_a_flipped_bit_is_other_weights(base, known, tmp_path):
    note_base(tmp_path, str(base), known)
    assert check_base(tmp_path, base)
    flip_a_bit(base / "model.safetensors")
    assert sampled_fingerprint(base) == known.sampled, "the sampled values do not show it"
    with pytest.raises(InputError, match=rf"other weights \(fingerprint was {known.weights}, is [0-9a-f]{{32}}\)"):
        check_base(tmp_path, base)


def test_another_vocabulary_is_named(base, known):
    lines = (base / "qwen.tiktoken").read_bytes().splitlines()
    lines[-1], lines[-2] = (
        lines[-2].split()[0] + b" " + lines[-1].split()[1],
        lines[-1].split()[0] + b" " + lines[-2].split()[1],
    )
    (base / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    (line,) = differences(known, identify_base(base))
    assert line.startswith("qwen.tiktoken: other tokens (fingerprint was ")


def test_a_text_only_checkpoint_has_an_identity(base, known):
    config = json.loads((base / "config.json").read_text()) | {"visual": None}
    (base / "config.json").write_text(json.dumps(config))
    found = identify_base(base)
    assert found.weights == known.weights
    assert "config.json: visual.image_size was 112, is not set" in differences(known, found)


def test_an_adapter_from_before_is_compared_by_the_sampled_values(base, known, tmp_path):
    (tmp_path / "base.json").write_text(json.dumps({"base": "there", "fingerprint": known.sampled}))
    flip_a_bit(base / "model.safetensors")
    edit_json(base / "config.json", seq_length=9)
    assert check_base(tmp_path, base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(InputError, match=f"other weights .fingerprint was {known.sampled}"):
        check_base(tmp_path, base)


@pytest.mark.parametrize("noted_before", [False, True])
def test_a_4_bit_folder_is_its_base_until_it_changes(base, known, tmp_path, noted_before):
    """The copy stands for it: what it holds is not looked at."""
    other = BaseIdentity("1" * 32, known.computation, known.tokenizer, "2" * 32)
    if noted_before:
        note = {"base": "there", "fingerprint": other.sampled, "own_fingerprint": sampled_fingerprint(base)}
        (base / "base.json").write_text(json.dumps(note))
    else:
        note_base(base, "there", other, quantize=["language"], own=weights_fingerprint(base))
    found = identify_base(base)
    assert differences(other, found) == differences(found, other) == []
    note_base(tmp_path, "there", other)
    assert check_base(tmp_path, base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors")
    assert identify_base(base).weights == weights_fingerprint(base)
    assert differences(other, identify_base(base))


def test_an_identity_is_stored_as_json(known):
    assert identity_from_json(json.loads(json.dumps(identity_to_json(known))), "here") == known
    old = identity_from_json("abc", "here")
    assert old == BaseIdentity(None, None, None, "abc") and identity_to_json(old) == {"sampled": "abc"}
    assert (known.fingerprint, old.fingerprint) == (known.weights, "abc")
    for damaged in (None, 5, [], {}, {"sampled": 5}, {"sampled": "a", "computation": {"seq_length": []}}):
        with pytest.raises(InputError, match="here: what it says of the base's fingerprints is damaged"):
            identity_from_json(damaged, "here")


def test_a_key_that_was_not_noted_is_not_compared(known):
    fewer = {key: value for key, value in known.computation.items() if key != "emb_dropout_prob"}
    assert differences(BaseIdentity(known.weights, fewer, None, ""), known) == []
