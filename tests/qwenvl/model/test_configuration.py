import json

import pytest

from qwenvl import InputError, QwenVLConfig


def test_unknown_keys_of_a_published_file_survive_a_save(tiny_folder, tmp_path):
    published = json.loads((tiny_folder / "config.json").read_text())
    QwenVLConfig.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    renamed = {"torch_dtype": "dtype"}
    for key, value in published.items():
        if key != "transformers_version":
            assert saved[renamed.get(key, key)] == value, key
    # The published code makes its vision tower with these keys as they are: no other key may join them.
    assert saved["visual"].keys() == published["visual"].keys()


def test_a_second_round_trip_changes_nothing(tiny_folder, tmp_path):
    first = QwenVLConfig.from_pretrained(tiny_folder)
    first.save_pretrained(tmp_path)
    assert QwenVLConfig.from_pretrained(tmp_path).to_dict() == first.to_dict()


def test_defaults_are_the_published_sizes():
    config = QwenVLConfig()
    assert (config.image_start_id, config.image_end_id, config.image_token_id) == (151857, 151858, 151859)
    assert config.n_queries == 256
    assert config.head_dim == 128


def test_a_file_without_visual_is_text_only(tmp_path):
    published = {"model_type": "qwen", "hidden_size": 256, "num_attention_heads": 2, "kv_channels": 128}
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = QwenVLConfig.from_pretrained(tmp_path)
    assert config.visual is None
    config.save_pretrained(tmp_path)
    assert QwenVLConfig.from_pretrained(tmp_path).visual is None


def changed(**changes) -> dict:
    visual = {
        "heads": 4,
        "image_size": 112,
        "image_start_id": 726,
        "layers": 2,
        "mlp_ratio": 4.9231,
        "output_dim": 256,
        "patch_size": 14,
        "width": 64,
    }
    return {"hidden_size": 256, "vocab_size": 768, "visual": {**visual, **changes}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (changed(output_dim=128), "visual.output_dim"),
        (changed(width=65), "visual.width"),
        (changed(heads=0), "visual.heads"),
        (changed(layers="two"), "visual.layers"),
        ({"seq_length": 0}, "seq_length"),
        (changed(image_size=100), "visual.image_size"),
        (changed(n_queries=200), "visual.n_queries"),
        (changed(image_start_id=766), "vocab_size"),
        ({"visual": {"heads": 4}}, "visual lacks image_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"no_bias": False}, "no_bias"),
        ({"rotary_pct": 0.5}, "rotary_pct"),
        ({"kv_channels": 127}, "kv_channels"),
    ],
)
def test_contradictions_are_named(keys, message):
    with pytest.raises(InputError, match=message):
        QwenVLConfig(**keys)
