"""A GGUF folder: written, compared with the source, and not there where something went wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_for_tests import NANO, UNAVAILABLE, exported
from recipes_for_tests import TINY
from safetensors.torch import load_file, save_file

from finetune.errors import Failed, UserError
from finetune.export import gguf as gguf_export
from finetune.export import gguf_check
from finetune.export.export import export
from finetune.export.gguf_check import compare
from finetune.export.gguf_file import quantized
from finetune.llamacpp.folder import read_folder
from finetune.terminal import labelled, say_nothing
from qwenvl.checkpoint.record import read_record

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


def tensors_of(file):
    import gguf

    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def source_copy(folder: Path, change) -> Path:
    """The nano checkpoint with changed tensors."""
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("making", "*.md"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_folder_has_all_that_belongs_to_the_model():
    folder = exported()
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("model-f16.gguf", "visual/visual.safetensors", "qwenvl.json", "config.json", "generation_config.json"),
        *("qwen.tiktoken", "tokenizer_config.json", "README.md", "README.source.md"),
    }
    record = read_record(folder)
    assert record.style == "chat" and record.base.path == str(NANO)
    card = (folder / "README.md").read_text()
    assert "At most 2,048 tokens" in card and "finetune serve path/to/this/folder" in card
    assert read_folder(folder).language.name == "model-f16.gguf"


def test_the_language_model_has_the_sources_values():
    source, written = load_file(NANO / "model.safetensors"), tensors_of(exported() / "model-f16.gguf")
    fused = source["transformer.h.1.attn.c_attn.weight"]
    for number, part in enumerate("qkv"):
        found = torch.from_numpy(written[f"blk.1.attn_{part}.weight"].data.astype(np.float32))
        assert torch.equal(found, fused[192 * number : 192 * (number + 1)].half().float())
    bias = torch.from_numpy(written["blk.2.attn_k.bias"].data.copy())
    assert bias.dtype == torch.float32
    assert torch.equal(bias, source["transformer.h.2.attn.c_attn.bias"][192:384].float())
    assert sum(int(np.prod(tensor.shape)) for tensor in written.values()) == sum(
        tensor.numel() for name, tensor in source.items() if "visual" not in name
    )


@pytest.mark.parametrize(
    ("kind", "error"), [("Q8_0", 0.006), ("Q5_0", 0.05), ("Q4_0", 0.11), ("Q4_K", 0.09), ("Q6_K", 0.02)]
)
def test_quantised_rows_are_near_the_values(kind, error):
    import gguf

    values = torch.randn(37, 512, generator=torch.Generator().manual_seed(0))
    content = quantized(values, kind)
    number = gguf.GGMLQuantizationType[kind]
    shape = gguf.quants.quant_shape_to_byte_shape(tuple(values.shape), number)
    read = torch.from_numpy(gguf.quants.dequantize(content.reshape(shape), number))
    assert error / 3 < float((read - values).square().mean().sqrt()) < error
    if kind in ("Q8_0", "Q4_0", "Q5_0"):  # which the package gguf quantises too
        assert np.array_equal(gguf.quants.quantize(values.numpy(), number).reshape(-1), content)


def test_each_type_is_checked_against_the_source(tmp_path):
    said = []
    for kind in ("q8_0", "q4_k_m"):
        out = export(str(NANO), "gguf", type=kind, out=tmp_path / kind, say=lambda *line: said.append(labelled(*line)))
        assert (out / f"model-{kind}.gguf").stat().st_size < (exported() / "model-f16.gguf").stat().st_size * 0.6
    checked = [line for line in said if "logits differ by" in line]
    assert ["text" in line for line in checked] == [True, False, True, False]
    assert "(allowed 0.1), 8 of 8 greedy tokens are equal" in checked[0]


def test_a_text_only_checkpoint(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    del config["visual"]
    (source / "config.json").write_text(json.dumps(config))
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, source)
    tensors = {name: one for name, one in load_file(TINY / "model.safetensors").items() if "visual" not in name}
    save_file(tensors, source / "model.safetensors")
    said = []
    out = export(str(source), "gguf", out=tmp_path / "out", say=lambda *line: said.append(labelled(*line)))
    assert not (out / "visual").exists() and read_folder(out).visual is None
    assert sum("logits differ by" in line for line in said) == 1


def nothing_is_left(folder: Path) -> bool:
    return not any("out" in path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("value", "reason"),
    [(1e5, "more than float16 can hold"), (float("nan"), "not finite"), (float("inf"), "not finite")],
)
def test_values_that_float16_cannot_hold_are_refused(tmp_path, value, reason):
    def change(tensors):
        tensors["transformer.h.1.mlp.w1.weight"][3, 5] = value

    source = source_copy(tmp_path / "source", change)
    with pytest.raises(UserError, match=rf"transformer\.h\.1\.mlp\.w1\.weight.*{reason}"):
        export(str(source), "gguf", out=tmp_path / "out", say=say_nothing)
    assert nothing_is_left(tmp_path)


def test_a_file_with_tensors_in_wrong_places_gets_no_name(tmp_path, monkeypatch):
    """What a mistake in the plan would give: two matrices of an MLP exchanged."""
    planned = gguf_export.plan_language

    def exchanged(*given):
        tensors = planned(*given)
        names = [tensor.name for tensor in tensors]
        first, second = (
            names.index("model.layers.2.mlp.up_proj.weight"),
            names.index("model.layers.2.mlp.gate_proj.weight"),
        )
        one, other = tensors[first], tensors[second]
        tensors[first] = type(one)(one.name, other.source, one.dtype, one.rows)
        tensors[second] = type(one)(other.name, one.source, other.dtype, other.rows)
        return tensors

    monkeypatch.setattr(gguf_export, "plan_language", exchanged)
    with pytest.raises(
        Failed, match=r"llama.cpp does not compute what the source does, on a text prompt: logits differ"
    ):
        export(str(NANO), "gguf", out=tmp_path / "out", say=say_nothing)
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, error):
    def interrupted(*given, **named):
        raise error

    monkeypatch.setattr(gguf_export, "check_gguf", interrupted)
    with pytest.raises((KeyboardInterrupt, Failed)):
        export(str(NANO), "gguf", out=tmp_path / "out", say=say_nothing)
    assert nothing_is_left(tmp_path)


def test_logits_that_are_no_numbers_are_not_taken_for_equal(tmp_path, monkeypatch):
    assert compare(torch.eye(4), torch.eye(4)).difference == 0
    found = compare(torch.eye(4) * float("nan"), torch.eye(4))
    monkeypatch.setattr(gguf_check, "compare", lambda logits, expected: found)
    with pytest.raises(Failed, match="logits differ by nan"):
        export(str(NANO), "gguf", out=tmp_path / "out", say=say_nothing)
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("to", "given", "reason"),
    [
        ("gguf", {"type": "q3_k"}, "--type must be one of f16, q8_0, q4_0, q4_k_m"),
        ("gguf", {"dtype": "float32"}, "--dtype has no effect with --to gguf"),
        ("gguf", {"shard_bytes": 1e9}, "--shard-size has no effect with --to gguf"),
        ("qwen2", {"type": "f16"}, "--type has no effect with --to qwen2"),
    ],
)
def test_arguments_without_effect_are_refused(tmp_path, to, given, reason):
    with pytest.raises(UserError, match=reason):
        export(str(TINY), to, out=tmp_path / "out", say=say_nothing, **given)


def test_heads_that_are_not_as_wide_as_the_hidden_states_are_refused(tmp_path):
    from qwenvl import QwenVLConfig

    config = QwenVLConfig.from_pretrained(TINY)
    config.kv_channels = 32
    with pytest.raises(UserError, match="4 heads of 32 are not as wide as the hidden states"):
        gguf_export.prepare_gguf(config, "x")
