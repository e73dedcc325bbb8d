"""Weights packed by GPTQ: read as the format says, every way of reading wrongly is seen, damaged files are named."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from gptq_for_tests import change_config, change_tensors, random_linear, save, write_int4, write_unpacked
from safetensors.torch import load_file

from qwenvl import InputError
from qwenvl.checkpoint import gptq
from qwenvl.checkpoint.checkpoint_files import locate_tensors
from qwenvl.checkpoint.fingerprint import weights_fingerprint

MODULE = "transformer.h.0.mlp.w1"


def write(folder: Path, tensors: dict[str, torch.Tensor], **settings) -> Path:
    save(tensors, folder)
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, **settings}})
    )
    return folder


def read(folder: Path) -> torch.Tensor:
    return locate_tensors(folder)[f"{MODULE}.weight"].read()


def test_values_packed_by_hand(tmp_path):
    """Two outputs' values worked out on paper from the format's description; the other six outputs are zero."""
    # Output 0 has codes 0 1 2 3 4 5 6 7, output 1 has 15 14 13 12 11 10 9 8.
    words = torch.zeros(1, 8, dtype=torch.int32)
    words[0, 0] = 0x76543210
    words[0, 1] = 0x89ABCDEF - (1 << 32)
    # Output 0 has zero point 8, output 1 has 3; both are stored minus one. The others have code 0 and zero point 1.
    zeros = torch.tensor([[0x00000027]], dtype=torch.int32)
    scales = torch.tensor([[0.5, 0.25] + [0.0] * 6], dtype=torch.float16)
    tensors = {f"{MODULE}.qweight": words, f"{MODULE}.qzeros": zeros, f"{MODULE}.scales": scales}
    located = locate_tensors(write(tmp_path, tensors, group_size=8))
    assert list(located) == [f"{MODULE}.weight"]
    weight = located[f"{MODULE}.weight"].read()
    assert weight.shape == (8, 8) and weight.dtype == torch.float16
    assert weight[0].tolist() == [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]
    assert weight[1].tolist() == [3.0, 2.75, 2.5, 2.25, 2.0, 1.75, 1.5, 1.25]
    assert not weight[2:].any()


@pytest.mark.parametrize("v2", [False, True], ids=["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size", "settings"),
    [
        (96, 40, 32, {}),
        (96, 40, 32, {"act_order": True}),
        (96, 40, 40, {}),  # the last group is smaller
        (64, 24, 128, {}),  # one group, which is not full
    ],
)
def test_weights_are_those_of_the_formula(tmp_path, v2, inputs, outputs, group_size, settings):
    linear = random_linear(inputs, outputs, group_size, seed=1, zeros_from=0 if v2 else 1, **settings)
    folder = write(
        tmp_path,
        linear.tensors(MODULE, v2=v2),
        group_size=group_size,
        desc_act="act_order" in settings,
        checkpoint_format="gptq_v2" if v2 else "gptq",
    )
    tensor, expected = locate_tensors(folder)[f"{MODULE}.weight"], linear.weight()
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((outputs, inputs), torch.float16, outputs * inputs * 2)
    assert torch.equal(tensor.read(), expected)


def test_one_group_for_all_inputs_and_no_group_indices(tmp_path):
    linear = random_linear(64, 24, 64, seed=2)
    tensors = linear.tensors(MODULE)
    del tensors[f"{MODULE}.g_idx"]
    assert torch.equal(read(write(tmp_path, tensors, group_size=-1)), linear.weight())


def test_parts_are_those_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(gptq, "CHUNK", 7 * 96)  # several chunks, whose size divides nothing
    linear = random_linear(96, 40, 32, seed=3, act_order=True)
    tensor = locate_tensors(write(tmp_path, linear.tensors(MODULE), desc_act=True))[f"{MODULE}.weight"]
    whole = linear.weight()
    for start, stop in ((0, 40), (0, None), (3, 11), (39, 99), (8, 8)):
        assert torch.equal(tensor.read(start, stop), whole[start:stop])
    memory = torch.empty(20_000, dtype=torch.uint8)
    part = tensor.read(5, 30, memory)
    assert torch.equal(part, whole[5:30]) and part.data_ptr() == memory.data_ptr()
    flat = whole.reshape(-1)
    for start, stop in ((0, 64), (5, 77), (90, 300), (96, 192), (104, 112), (3800, 9999), (50, 50)):
        assert torch.equal(tensor.flat(start, stop), flat[start:stop])


def swapped_nibbles(words):
    return right_unpacked(words).view(len(words), -1, 2).flip(2).reshape(len(words), -1)


def highest_first(words):
    return right_unpacked(words).view(len(words), -1, 8).flip(2).reshape(len(words), -1)


right_unpacked = gptq._unpacked


@pytest.mark.parametrize("fault", ["off by one", "no minus one", "nibbles", "order", "axes", "zeros and codes"])
def test_a_faulty_reader_would_be_seen(tmp_path, monkeypatch, fault):
    """The tests above would fail with each of these readers."""
    linear = random_linear(64, 64, 32, seed=4)
    folder = write(tmp_path, linear.tensors(MODULE))
    assert torch.equal(read(folder), linear.weight())
    match fault:
        case "off by one":
            monkeypatch.setitem(gptq.ADDED_TO_ZEROS, None, 2)
        case "no minus one":
            monkeypatch.setitem(gptq.ADDED_TO_ZEROS, None, 0)
        case "nibbles":
            monkeypatch.setattr(gptq, "_unpacked", swapped_nibbles)
        case "order":
            monkeypatch.setattr(gptq, "_unpacked", highest_first)
        case "axes":
            monkeypatch.setattr(gptq._Columns, "rows", transposed_rows)
        case "zeros and codes":
            monkeypatch.setattr(gptq._Columns, "rows", negated_rows)
    assert not torch.equal(read(folder), linear.weight())


right_rows = gptq._Columns.rows


def transposed_rows(self, start, stop, out):
    right_rows(self, start, stop, out)
    out.copy_(out.T.clone())


def negated_rows(self, start, stop, out):
    right_rows(self, start, stop, out)
    out.neg_()


def test_a_folder_shows_ordinary_weights(tmp_path):
    """Names, shapes, types, values and fingerprint are those of a float16 checkpoint with the same weights."""
    packed, plain = locate_tensors(write_int4(tmp_path)), locate_tensors(write_unpacked(tmp_path))
    assert packed.keys() == plain.keys()
    for name, tensor in packed.items():
        assert (tensor.shape, tensor.dtype) == (plain[name].shape, plain[name].dtype)
        assert torch.equal(tensor.read(), plain[name].read()), name
    assert weights_fingerprint(tmp_path / "int4") == weights_fingerprint(tmp_path / "float16")


def test_settings_beside_the_config(tmp_path):
    """AutoGPTQ's older versions write a file of their own, without the method."""
    int4 = write_int4(tmp_path)
    config = json.loads((int4 / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (int4 / "quantize_config.json").write_text(json.dumps(settings))
    (int4 / "config.json").write_text(json.dumps(config))
    assert torch.equal(read(int4), locate_tensors(write_unpacked(tmp_path))[f"{MODULE}.weight"].read())
    (int4 / "quantize_config.json").unlink()
    with pytest.raises(InputError, match=r"packed, but config\.json has no quantization_config"):
        locate_tensors(int4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"int4/config.json: GPTQ with bits: 3, but only GPTQ of 4 bits .* give the 16-bit checkpoint"),
        ({"bits": 8}, "bits: 8"),
        ({"bits": None}, "bits: None"),
        ({"quant_method": "awq"}, "quantised by 'awq', which cannot be read"),
        ({"group_size": None}, "group_size must be a positive whole number, or -1, not None"),
        ({"group_size": 0}, "not 0"),
        ({"group_size": 128}, r"qzeros has shape \(4, 96\), where GPTQ of this group_size has \(2, 96\)"),
        ({"desc_act": "no"}, "desc_act must be true or false"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', and gptq, gptq_v2 can be read"),
        ({"is_marlin_format": True}, "is_marlin_format: True cannot be read"),
        ({"pack_dtype": "int64"}, "pack_dtype: 'int64' cannot be read"),
        ({"dynamic": {"w1": {"bits": 8}}}, "dynamic: .* cannot be read"),
    ],
)
def test_other_settings_are_refused(tmp_path, settings, message):
    int4 = write_int4(tmp_path)
    config = json.loads((int4 / "config.json").read_text())
    quantization = config["quantization_config"] | settings
    change_config(int4, quantization_config={key: value for key, value in quantization.items() if value is not None})
    with pytest.raises(InputError, match=message):
        locate_tensors(int4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, r"w1.scales is missing beside transformer.h.0.mlp.w1.qweight: fetch the weights again"),
        ({"qzeros": None}, "w1.qzeros is missing"),
        ({"qweight": None}, r"there is a transformer.h.0.mlp.w1.\w+, but no transformer.h.0.mlp.w1.qweight"),
        ({"scales": torch.ones(4, 255).half()}, r"w1.scales has shape \(4, 255\), where GPTQ .* has \(4, 256\)"),
        ({"qzeros": torch.ones(4, 16, dtype=torch.int32)}, r"w1.qzeros has shape \(4, 16\)"),
        ({"qweight": torch.ones(16, 256, dtype=torch.int32)}, r"where GPTQ of this group_size has \(2, 32\)"),
        ({"qweight": torch.ones(32, 256)}, "w1.qweight is of type torch.float32, where GPTQ has int32"),
        ({"scales": torch.ones(4, 256, dtype=torch.int32)}, "w1.scales is of type torch.int32"),
        ({"g_idx": torch.zeros(255, dtype=torch.int32)}, r"w1.g_idx has shape \(255,\)"),
        ({"weight": torch.ones(256, 256)}, "both transformer.h.0.mlp.w1.weight and .* are here"),
        ({"bias": torch.ones(256).half()}, "w1.bias is not zero, and Qwen has no bias there"),
    ],
)
def test_damaged_tensors_are_named(tmp_path, changes, message):
    int4 = write_int4(tmp_path)
    change_tensors(int4, **changes)
    with pytest.raises(InputError, match=rf"int4/model.safetensors: .*{message}"):
        locate_tensors(int4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g_idx": torch.full((256,), 4, dtype=torch.int32)}, "w1.g_idx names groups other than the 4 of its scales"),
        ({"g_idx": torch.full((256,), -1, dtype=torch.int32)}, "w1.g_idx names groups"),
        ({"g_idx": torch.arange(256, dtype=torch.int32) % 4}, "groups of 64, although desc_act is false"),
        ({"qzeros": torch.full((4, 32), -1, dtype=torch.int32)}, r"w1.qzeros holds a zero point of 15 \+ 1"),
    ],
)
def test_damaged_values_are_named_when_they_are_read(tmp_path, changes, message):
    int4 = write_int4(tmp_path)
    change_tensors(int4, **changes)
    for attempt in (read, lambda folder: locate_tensors(folder)[f"{MODULE}.weight"].flat(0, 9)):
        with pytest.raises(InputError, match=message):
            attempt(int4)


def test_act_order_needs_its_group_indices(tmp_path):
    int4 = write_int4(tmp_path, desc_act=True)
    change_tensors(int4, g_idx=None)
    with pytest.raises(InputError, match=r"w1\.g_idx is missing, which act-order needs"):
        locate_tensors(int4)


@pytest.mark.parametrize("act_order", [False, True])
def test_against_autogptq(tmp_path, act_order):
    """AutoGPTQ packs a layer, and multiplies the identity with it: ours are its weights, bit for bit."""
    package = importlib.util.find_spec("auto_gptq")
    if package is None:
        pytest.skip("auto-gptq is not installed (pip install --no-deps auto-gptq)")
    # Its package imports names that current Transformers has not; the layer by itself does not need them.
    name = "qlinear_cuda" if act_order else "qlinear_cuda_old"
    file = Path(package.submodule_search_locations[0], "nn_modules", "qlinear", f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    ours = random_linear(128, 64, 32, seed=5, act_order=act_order)
    linear = torch.nn.Linear(128, 64, bias=False).half()
    linear.weight.data = ours.weight()
    theirs = module.QuantLinear(4, 32, 128, 64, bias=False, **({} if act_order else {"use_cuda_fp16": False}))
    theirs.autogptq_cuda_available = False
    theirs.pack(linear, ours.scales.T.float(), ours.zeros.T.float(), ours.groups.to(torch.int32))
    tensors = {f"{MODULE}.{key}": value for key, value in theirs.state_dict().items()}
    assert all(torch.equal(value, ours.tensors(MODULE)[key]) for key, value in tensors.items())
    folder = write(tmp_path, tensors, desc_act=act_order)
    multiplied = theirs.half()(torch.eye(128, dtype=torch.float16)).T
    assert torch.equal(read(folder), multiplied)
    assert load_file(folder / "model.safetensors").keys() == tensors.keys()
