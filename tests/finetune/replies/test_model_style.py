"""How a model is asked and loaded: an option, its record, its published files, or a question to the user."""

import json
import shutil

import pytest
import torch
from recipes_for_tests import TINY
from records_for_tests import note_base
from safetensors.torch import save_file

from finetune.errors import InputError, UserError
from finetune.replies.model_style import find_use
from qwenvl.checkpoint.identity import BaseIdentity

WEIGHTS = "adapter_model.safetensors"
UNKNOWN = BaseIdentity(None, None, None, "0")
PUBLISHED = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["c_attn"],
    "base_model_name_or_path": None,
}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(TINY, folder)
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture
def adapter(tmp_path, checkpoint):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(PUBLISHED | {"base_model_name_or_path": str(checkpoint)}))
    save_file({"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(4, 8)}, folder / WEIGHTS)
    return folder


def published(checkpoint, chat_format):
    (checkpoint / "generation_config.json").write_text(json.dumps({"chat_format": chat_format}))


@pytest.mark.parametrize(("chat_format", "style"), [("chatml", "chat"), ("raw", "base")])
def test_a_published_checkpoint_says_it_in_its_generation_config(checkpoint, chat_format, style):
    published(checkpoint, chat_format)
    use = find_use(str(checkpoint))
    assert use.style == style and use.quantized == ()
    assert str(use) == f"asked as a {style} model (generation_config.json)"


@pytest.mark.parametrize("text", [None, "{}", '{"chat_format": "other"}'])
def test_what_nothing_says_is_asked_for(checkpoint, text):
    if text is not None:
        (checkpoint / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"does not say whether .*Give --style chat or --style base"):
        find_use(str(checkpoint))
    assert str(find_use(str(checkpoint), style="base")) == "asked as a base model (--style base)"


def test_an_adapter_of_another_program_on_a_base_model_could_be_either(checkpoint, adapter):
    published(checkpoint, "raw")
    with pytest.raises(UserError, match=r"nothing says whether this adapter was trained on chats .*Give --style chat"):
        find_use(str(adapter))
    assert find_use(str(adapter), style="chat").style == "chat"
    published(checkpoint, "chatml")
    assert str(find_use(str(adapter))) == "asked as a chat model (its base is a chat model)"


def test_the_record_of_an_adapter_goes_before_the_config_of_its_base(checkpoint, adapter):
    published(checkpoint, "raw")
    note_base(adapter, checkpoint, UNKNOWN)
    assert str(find_use(str(adapter))) == "asked as a chat model (qwenvl.json)"
    assert find_use(str(adapter), style="base").style == "base"


def test_an_adapter_of_before_there_were_records(checkpoint, adapter):
    published(checkpoint, "raw")
    (adapter / "base.json").write_text(
        json.dumps({"base": str(checkpoint), "fingerprint": "0", "quantize": ["language"]})
    )
    use = find_use(str(adapter))
    assert use.style == "chat" and use.quantized == ("language",)
    assert str(use) == (
        "asked as a chat model (this toolkit trained it, and trains ChatML); base in 4 bits: language (as it was "
        "trained; --quantization none for 16 bits)"
    )


def test_an_adapter_is_loaded_as_it_was_trained_or_as_told(checkpoint, adapter):
    note_base(adapter, checkpoint, UNKNOWN, quantize=["language", "head"])
    use = find_use(str(adapter))
    assert (use.quantization, use.quantize) == ("nf4", ("language", "head"))
    use = find_use(str(adapter), quantization="none")
    assert (use.quantization, use.quantize) == ("none", None)
    assert str(use).endswith("; base in 16 or 32 bits (--quantization none)")


def test_a_base_that_was_moved_is_given(checkpoint, adapter, tmp_path):
    published(checkpoint, "chatml")
    checkpoint.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"is not there. If it was moved, give its new place with --base"):
        find_use(str(adapter))
    assert find_use(str(adapter), base=str(tmp_path / "moved")).source.base == str(tmp_path / "moved")


def test_the_result_of_a_run_of_before_there_were_records_is_a_chat_model(checkpoint, tmp_path):
    published(checkpoint, "raw")
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.rename(run / "model")
    (run / "run.json").write_text("{}")
    for path in (run, run / "model"):
        assert find_use(str(path)).style == "chat"


def test_a_damaged_generation_config_is_named(checkpoint):
    for text in ("[]", "{", ""):
        (checkpoint / "generation_config.json").write_text(text)
        with pytest.raises(InputError, match=r"generation_config\.json (is not JSON|is empty|holds a list)"):
            find_use(str(checkpoint))
