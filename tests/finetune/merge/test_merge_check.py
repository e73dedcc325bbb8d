"""The check after a merge, and merges after a training in 4 bits, for which it measures more."""

import sys

import psutil
import pytest
import torch
from adapters_for_tests import TINY, base_in, make_adapter
from records_for_tests import note_base
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from finetune.errors import Failed, UserError
from finetune.merge.adapter_weights import read_adapter
from finetune.merge.check import (
    answer,
    answer_in_fresh_process,
    check_rounding,
    compare_logits,
    main,
    sample_prompt,
)
from finetune.merge.merge import merge, plan_tensors
from finetune.merge.sources import find_sources
from finetune.terminal import labelled
from qwenvl import load_model
from qwenvl.base_check import identify_base
from qwenvl.checkpoint.checkpoint_files import locate_tensors
from qwenvl.model.nf4_weights import dequantized
from qwenvl.model.quantization import quantized_names

logging.disable_progress_bar()
logging.set_verbosity_error()


def merged(adapter, to, **settings):
    """Merge with the check, the fresh process left out: it has its own test and takes seconds."""
    lines = []
    merge(adapter, to, say=lambda *said: lines.append(labelled(*said)), **settings)
    return "\n".join(lines)


@pytest.fixture
def in_this_process(monkeypatch):
    def ask(folder):
        prompt = sample_prompt(folder, visual=True)
        return prompt["input_ids"], answer(load_model(folder), prompt)

    monkeypatch.setattr("finetune.merge.check.answer_in_fresh_process", ask)


def test_the_program_of_the_fresh_process_answers_as_this_one(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["merge_check", str(TINY), str(tmp_path / "answer.safetensors")])
    main()
    read, prompt = load_file(tmp_path / "answer.safetensors"), sample_prompt(TINY, visual=True)
    assert torch.equal(read["input_ids"], prompt["input_ids"])
    assert torch.equal(read["logits"], answer(tiny_model, prompt))
    assert read["logits"].shape == (32, 768)
    assert prompt["pixel_values"].shape[0] == 1


def test_a_folder_that_cannot_be_used_fails_the_check(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "HF_HUB_OFFLINE is $HF_HUB_OFFLINE, $3 is no model" >&2; exit 3\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(Failed, match=r"cannot be used: HF_HUB_OFFLINE is 1, .*examples/tiny is no model"):
        answer_in_fresh_process(TINY)


def test_logits_are_held_against_the_tolerance():
    adapted = torch.randn(4, 10)
    assert compare_logits(adapted, adapted, 1e-5).relative == 0
    compared = compare_logits(adapted * 1.001, adapted, 1e-2)
    assert compared.relative == pytest.approx(1e-3, rel=1e-3)
    assert compared.largest == pytest.approx(1e-3 * float(adapted.abs().max()), rel=1e-3)
    for wrong in (adapted * 1.001, adapted * torch.nan):
        with pytest.raises(Failed, match="does not answer as base and adapter do"):
            compare_logits(wrong, adapted, 1e-5)
    assert compare_logits(adapted * 2, adapted, None).relative == pytest.approx(1)


@pytest.mark.parametrize("name", ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"])
def test_one_wrong_value_in_a_written_tensor_is_found(tmp_path, name):
    adapter, to = tmp_path / "adapter", tmp_path / "to"
    make_adapter(adapter)
    merged(adapter, to, check=False)
    sources = find_sources(adapter, None)
    stored = locate_tensors(TINY)
    plan = plan_tensors(stored, read_adapter(adapter, stored), sources, "auto", "base")
    looked_at = {tensor.base.name for tensor in plan if tensor.change is not None} | {plan[0].base.name}
    assert check_rounding(to, plan) >= len(looked_at)
    weights = load_file(to / "model.safetensors")
    damaged = name if name in looked_at else plan[0].base.name
    weights[damaged].view(-1)[-1] += 1e-3
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failed, match=f"{damaged} was not written as it was computed"):
        check_rounding(to, plan)


def test_a_disk_that_gives_back_something_else_is_noticed_and_nothing_is_kept(tmp_path, monkeypatch, in_this_process):
    make_adapter(tmp_path / "adapter")
    monkeypatch.setattr("finetune.merge.check.file_hash", lambda path: "0" * 64)
    with pytest.raises(Failed, match=r"model\.safetensors reads back as something else"):
        merged(tmp_path / "adapter", tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_merge_that_computes_something_else_is_noticed_and_nothing_is_kept(tmp_path, monkeypatch, in_this_process):
    make_adapter(tmp_path / "adapter")
    # As a wrong scale would: the weights are then what was computed, but not the trained model's.
    monkeypatch.setattr("finetune.merge.adapter_weights._Reader._rank_and_alpha", lambda self, module: (4, 8.01))
    with pytest.raises(Failed, match="does not answer as base and adapter do"):
        merged(tmp_path / "adapter", tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_logits_agree_within_their_tolerance(tmp_path, dtype, in_this_process):
    make_adapter(tmp_path / "adapter")
    said = merged(tmp_path / "adapter", tmp_path / "to", dtype=dtype)
    assert f"(allowed: {0.15 if dtype == 'bfloat16' else 0.03})" in said


def test_where_memory_is_short_that_is_said(tmp_path, monkeypatch):
    make_adapter(tmp_path / "adapter")
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    said = merged(tmp_path / "adapter", tmp_path / "to")
    assert "not compared: that takes about 10.2 MB of memory, and 1.0 kB are free" in said
    assert "not compared" in (tmp_path / "to" / "README.md").read_text()


# After a training in 4 bits


@pytest.fixture
def trained_in_4_bits(tmp_path):
    """An adapter that says it was trained on the language model in 4 bits."""
    make_adapter(tmp_path / "adapter", own=False)
    note_base(tmp_path / "adapter", TINY, identify_base(TINY), quantize=["language"])
    return tmp_path / "adapter"


def test_onto_the_base_the_difference_to_what_was_trained_is_measured(tmp_path, trained_in_4_bits, in_this_process):
    said = merged(trained_in_4_bits, tmp_path / "to", onto="base")
    assert "merged into the base's own weights, which the training saw in 4 bits (language)" in said
    assert "4-bit base  its weights are 9." in said  # percent; NF4's relative error
    assert "from base with adapter (allowed: 1e-05)" in said
    assert "from the 4-bit model that was trained" in said
    card = (tmp_path / "to" / "README.md").read_text()
    assert "Trained on a 4-bit base (Q-LoRA)" in card
    assert "from the 4-bit model that was trained" in card
    expected = load_model(TINY, adapter=trained_in_4_bits, quantization="none").merge_and_unload().state_dict()
    weights = load_file(tmp_path / "to" / "model.safetensors")
    assert max(float((weights[name] - expected[name]).abs().max()) for name in weights) <= 1e-6


def test_a_merge_is_by_default_onto_what_training_saw_the_quantised_linears_are_rounded_as_there(
    tmp_path, trained_in_4_bits, in_this_process
):
    said = merged(trained_in_4_bits, tmp_path / "to")
    assert "merged into the weights as that training saw them (language quantised and dequantised)" in said
    assert "from the 4-bit model with the adapter (allowed: 1e-05)" in said
    names = quantized_names(load_model(TINY).config, ("language",))
    base, weights = (load_file(folder / "model.safetensors") for folder in (TINY, tmp_path / "to"))
    adapter = load_file(trained_in_4_bits / "adapter_model.safetensors")
    for name, tensor in base.items():
        expected = dequantized(tensor, torch.float32) if name in names else tensor
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in adapter:
            expected = expected + 2 * (adapter[f"{key}B.weight"] @ adapter[f"{key}A.weight"])
        assert (weights[name] - expected).abs().max() <= 1e-6, name
    assert len(names) == 10


def test_dequantized_is_only_for_trainings_in_4_bits(tmp_path):
    make_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match="--onto dequantized is for adapters trained on a 4-bit base"):
        merged(tmp_path / "adapter", tmp_path / "to", onto="dequantized")


def test_a_quantised_base_leads_to_the_one_it_was_made_from(tmp_path, trained_in_4_bits):
    quantized = base_in(tmp_path / "quantized", torch.bfloat16)
    config = (quantized / "config.json").read_text()
    (quantized / "config.json").write_text(config.replace("{", '{"quantization_config": {"load_in_4bit": true},', 1))
    with pytest.raises(UserError, match=r"is quantised: .* Give the 16-bit checkpoint that it was made from with"):
        merged(trained_in_4_bits, tmp_path / "to", base=str(quantized))
    note_base(quantized, TINY, identify_base(TINY), quantize=["language"])
    said = merged(trained_in_4_bits, tmp_path / "to", base=str(quantized), check=False)
    assert f"base        {TINY}" in said
