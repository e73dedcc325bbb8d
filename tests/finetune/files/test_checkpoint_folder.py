import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from finetune.errors import InputError, MissingFileError, UserError
from finetune.files.checkpoint_folder import (
    companion_folder,
    copy_companions,
    dtype_settings,
    read_config,
    read_generation_config,
    read_tokenizer,
)
from qwenvl import QwenVLConfig

EXTRA = {
    "modeling_qwen.py": "raise SystemExit('published code was run')",
    "SimSun.ttf": "a font",
    "LICENSE": "Tongyi Qianwen LICENSE AGREEMENT",
    "NOTICE.txt": "a notice",
    "special_tokens_map.json": "{}",
    "preprocessor_config.json": '{"size": 112}',
}
NOT_KEPT = {
    "README.md": "about the base",
    "model.safetensors.index.json": "{}",
    "pytorch_model-00001-of-00002.bin": "weights",
    "training_args.bin": "pickle",
    "notes.txt": "notes",
    "optimizer.pt": "state",
}


@pytest.fixture
def source(tmp_path, tiny_folder):
    folder = tmp_path / "source"
    shutil.copytree(tiny_folder, folder)
    for name, text in (EXTRA | NOT_KEPT).items():
        (folder / name).write_text(text)
    (folder / "assets").mkdir()
    return folder


@pytest.fixture
def made(tmp_path):
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


def test_everything_but_weights_and_notes_is_copied_byte_for_byte(source, made):
    names = copy_companions(source, made)
    published = {"config.json", "generation_config.json", "qwen.tiktoken", "tokenizer_config.json"}
    assert set(names) == {path.name for path in made.iterdir()} == published | EXTRA.keys()
    assert all((made / name).read_bytes() == (source / name).read_bytes() for name in names)


def test_the_config_keeps_what_is_not_changed(source, made):
    copy_companions(source, made, config={"torch_dtype": "bfloat16", "bf16": True, "transformers_version": None})
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, made))
    assert after == {key: value for key, value in before.items() if key != "transformers_version"} | {
        "torch_dtype": "bfloat16",
        "bf16": True,
    }
    assert list(after) == [key for key in before if key != "transformers_version"]
    assert after["onnx_safe"] is None
    assert QwenVLConfig.from_pretrained(made).dtype == torch.bfloat16


def test_the_type_is_said_in_the_keys_that_are_there(source):
    config = json.loads((source / "config.json").read_text())
    assert dtype_settings(config, torch.bfloat16) == {
        "torch_dtype": "bfloat16",
        "bf16": True,
        "fp16": False,
        "fp32": False,
    }
    # Transformers before version 5 reads torch_dtype alone, and 5 writes dtype.
    assert dtype_settings({"dtype": "float32"}, torch.float16) == {"dtype": "float16", "torch_dtype": "float16"}
    assert dtype_settings({}, torch.float16) == {"torch_dtype": "float16"}


def test_chat_format_brings_where_replies_end(source, made):
    raw = {"chat_format": "raw", "eos_token_id": 512, "do_sample": True, "top_p": 0.01, "max_new_tokens": 512, "x": 1}
    (source / "generation_config.json").write_text(json.dumps(raw))
    copy_companions(source, made, generation={"chat_format": "chatml"})
    after = json.loads((made / "generation_config.json").read_text())
    assert after == raw | {"chat_format": "chatml", "eos_token_id": 512, "pad_token_id": 512}


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        ({"chat_format": "chatml", "eos_token_id": [514, 513, 512]}, 512),
        ({"chat_format": "chatml", "eos_token_id": [514, 512]}, [514, 512]),  # not all of ChatML's
        ({"eos_token_id": [512]}, 512),
        ({"chat_format": "chatml", "eos_token_id": [514, 513, 512, 9]}, [514, 513, 512, 9]),
        ({"chat_format": "raw", "eos_token_id": [514, 513, 512]}, [514, 513, 512]),  # nothing else says it
        ({"eos_token_id": [514, 513, 512]}, [514, 513, 512]),
    ],
)
def test_stop_tokens_that_the_chat_format_says_are_written_as_published(source, made, stored, written):
    (source / "generation_config.json").write_text(json.dumps(stored))
    copy_companions(source, made)
    assert json.loads((made / "generation_config.json").read_text()) == stored | {"eos_token_id": written}


def test_sampling_settings_beside_greedy_decoding_are_left_out_with_chat_format(source, made):
    copy_companions(source, made, generation={"chat_format": "chatml"})
    after = json.loads((made / "generation_config.json").read_text())
    assert after["do_sample"] is False
    assert not {"top_p", "top_k"} & after.keys()


def test_a_generation_config_is_made_where_there_is_none(source, made):
    (source / "generation_config.json").unlink()
    assert "generation_config.json" in copy_companions(source, made, generation={"chat_format": "chatml"})
    after = json.loads((made / "generation_config.json").read_text())
    assert after == {"chat_format": "chatml", "eos_token_id": 512, "pad_token_id": 512}


def test_a_hub_id_is_found_in_the_cache(source, made, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    for path in source.iterdir():
        if path.is_file():
            shutil.copy(path, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "qwen.tiktoken" in copy_companions("owner/name", made)
    assert (made / "SimSun.ttf").read_text() == "a font"


def test_what_is_not_there_is_named(made, tmp_path):
    match = "owner/unknown: no folder here has this name, and as a hub id it cannot be fetched"
    with pytest.raises(MissingFileError, match=match):
        copy_companions("owner/unknown", made)
    with pytest.raises(MissingFileError, match=r"no config\.json here"):
        copy_companions(made, tmp_path)


def test_a_config_that_is_not_json_is_named(source, made):
    (source / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        copy_companions(source, made, config={"bf16": True})


def test_only_code_at_the_top_level_is_copied(source, made):
    """That of a published checkpoint, which runs it elsewhere; scripts in sub-folders are no part of it."""
    (source / "making").mkdir()
    for name in ("train.py", "LICENSE.txt", "config.json", "font.ttf"):
        (source / "making" / name).write_text("not for a checkpoint")
    (source / "modeling.py").write_text("class Model: ...")
    copy_companions(source, made)
    assert (made / "modeling.py").read_text() == "class Model: ..."
    assert not (made / "making").exists() and not (made / "train.py").exists()
    assert (made / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_hub_id_fetches_no_sub_folders(monkeypatch, source):
    asked = {}

    def download(name, **settings):
        asked.update(settings)
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert companion_folder("owner/name") == source
    files = ["modeling.py", "making/train.py", "config.json", "making/documents/page.py"]
    kept = filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == ["modeling.py", "config.json"]


def test_a_file_that_cannot_be_read_is_named(source, made, monkeypatch):
    read_bytes = Path.read_bytes

    def refuse(path):
        if path.name == "LICENSE":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read .*/LICENSE: you have no permission"):
        copy_companions(source, made)


DAMAGED = {
    "empty": b"",
    "cut": b'{"hidden_size": 2',
    "a list": b"[]",
    "binary": b"\xff\xfe\x00\x01",
    "nested": b"[" * 200_000,
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1140\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", read_config),
        ("generation_config.json", read_generation_config),
        ("tokenizer_config.json", read_tokenizer),
        ("qwen.tiktoken", read_tokenizer),
    ],
)
def test_a_damaged_file_is_an_input_error(source, name, read, damage):
    (source / name).write_bytes(DAMAGED[damage])
    with pytest.raises(InputError):
        read(source)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "large"},
        {"hidden_size": None},
        {"visual": 5},
        {"visual": {}},
        {"quantization_config": 5},
    ],
)
def test_a_config_of_another_kind_is_an_input_error(source, changes):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=r"config"):
        read_config(source)


@pytest.mark.parametrize("settings", [{"max_new_tokens": -1}, {"eos_token_id": "x"}, {"pad_token_id": [1, "x"]}])
def test_generation_settings_that_cannot_be_used_are_an_input_error(source, settings):
    (source / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"generation_config\.json"):
        read_generation_config(source)
