"""4-bit loading: from every stored form, in three types, reloaded bit by bit, trained after evaluation, lean."""

import gc
import importlib.util
import shutil
from pathlib import Path

import bitsandbytes.functional
import pytest
import torch
from peft import LoraConfig, get_peft_model
from records_for_tests import note_base
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

from qwenvl import InputError, QwenVLConfig, load_model
from qwenvl.base_check import identify_base
from qwenvl.checkpoint.fingerprint import weights_fingerprint
from qwenvl.checkpoint.record import read_record
from qwenvl.loading import find_parts
from qwenvl.model import quantization
from qwenvl.model.host_embedding import HostEmbedding
from qwenvl.model.nf4_weights import dequantized, is_quantized, quantize
from qwenvl.model.quantization import quantized_names, quantized_parts
from tests.qwenvl.test_loading import PUBLISHED_LORA, store, train_a_little

DTYPES = ["float32", "bfloat16", "float16"]
ALL = ("language", "vision", "head")


def in_4_bits(model) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if is_quantized(module)}


def same_bits(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.fixture
def logits(expected):
    def compute(model, **changes):
        with torch.no_grad():
            ids = expected["one_image.input_ids"][None]
            return model(input_ids=ids, pixel_values=expected["pixel_values"][:1], **changes).logits

    return compute


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [("language",), ALL])
def test_what_is_in_4_bits(tiny_folder, dtype, parts):
    """Each weight's bits are those of the stored one rounded to the type; all else is loaded as without 4 bits."""
    model = load_model(tiny_folder, quantization="nf4", quantize=parts, dtype=dtype)
    plain = load_model(tiny_folder, dtype=dtype)
    expected = quantized_names(model.config, parts)
    assert in_4_bits(model) == expected and not model.training
    assert quantized_parts(model.config) == parts
    state, plain_state = model.state_dict(), plain.state_dict()
    for name, tensor in plain_state.items():
        if name in expected:
            codes, quant_state = quantize(tensor)
            stored = {f"{name}.{key}": value for key, value in quant_state.as_dict(packed=True).items()} | {
                name: codes
            }
            assert all(torch.equal(state[key], value) for key, value in stored.items()), name
        else:
            assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    for module in model.modules():
        if is_quantized(module):
            assert module.support_avx512bf16_for_cpu is False and module.compute_dtype == getattr(torch, dtype)


@pytest.mark.parametrize("form", ["sharded bin", "bin", "sharded safetensors"])
def test_every_stored_form_makes_the_same_bits(tiny_folder, tmp_path, form):
    copy = store(tiny_folder, tmp_path / "copy", form, torch.bfloat16)
    reference = store(tiny_folder, tmp_path / "reference", "safetensors", torch.bfloat16)
    load = {"quantization": "nf4", "quantize": ALL, "dtype": "bfloat16"}
    same_bits(load_model(copy, **load), load_model(reference, **load))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_folder_is_the_same_bits(tiny_folder, tmp_path, logits, dtype):
    model = load_model(tiny_folder, quantization="nf4", dtype=dtype)
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert quantized_parts(QwenVLConfig.from_pretrained(tmp_path)) == ("language",)
    for given in ({}, {"quantization": "nf4"}, {"quantization": "nf4", "quantize": ["language"], "dtype": dtype}):
        reloaded = load_model(tmp_path, **given)
        same_bits(reloaded, model)
        assert torch.equal(logits(reloaded), before)


def test_a_saved_folder_with_vision_and_head(tiny_folder, tmp_path):
    model = load_model(tiny_folder, quantization="nf4", quantize=ALL)
    model.save_pretrained(tmp_path)
    reloaded = load_model(tmp_path)
    same_bits(reloaded, model)
    assert in_4_bits(reloaded) == quantized_names(model.config, ALL)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_folder_computes_in_the_type_asked_for(tiny_folder, tmp_path, logits, dtype):
    """Made in bfloat16, loaded in another: nothing is left that would compute, or come back, in the old one."""
    load_model(tiny_folder, quantization="nf4", dtype="bfloat16").save_pretrained(tmp_path)
    wanted = getattr(torch, dtype)
    model = load_model(tmp_path, dtype=dtype)
    kept = {parameter.dtype for name, parameter in model.named_parameters() if name not in in_4_bits(model)}
    assert kept == {wanted} and logits(model).dtype == wanted
    linears = [module for module in model.modules() if is_quantized(module)]
    assert {linear.weight.quant_state.dtype for linear in linears} == {wanted}
    inputs = torch.randn(3, 256, dtype=wanted, requires_grad=True)
    linears[0](inputs).sum().backward()
    weight = load_file(tiny_folder / "model.safetensors")["transformer.h.0.attn.c_attn.weight"].bfloat16()
    codes, state = quantize(weight)
    state.dtype = wanted
    seen = torch.ones(3, len(weight), dtype=wanted) @ bitsandbytes.functional.dequantize_4bit(codes, state)
    assert torch.equal(inputs.grad, seen)


def test_logits_are_those_of_the_dequantized_model(tiny_folder, logits):
    model = load_model(tiny_folder, quantization="nf4")
    plain = load_model(tiny_folder)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-2)
    for name in quantized_names(plain.config, ("language",)):
        weight = plain.get_parameter(name)
        weight.data = dequantized(weight.data, torch.float32)
    assert torch.equal(logits(model), logits(plain))


def test_a_4_bit_head(tiny_folder, logits):
    """Its weight has no float type that its input could be cast to."""
    model = load_model(tiny_folder, quantization="nf4", quantize=["language", "head"])
    plain = load_model(tiny_folder)
    for name in quantized_names(plain.config, ("language", "head")):
        weight = plain.get_parameter(name)
        weight.data = dequantized(weight.data, torch.float32)
    assert torch.equal(logits(model), logits(plain))
    kept = torch.tensor([3, 7])
    assert torch.equal(logits(model, logits_to_keep=kept), logits(plain, logits_to_keep=kept))


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_after_evaluation(tiny_folder, dtype):
    """On some CPUs bitsandbytes repacks weights in the first evaluation; gradients after it would be wrong."""
    model = load_model(tiny_folder, quantization="nf4", dtype=dtype)
    model.requires_grad_(False)
    ids = torch.arange(1, 60)[None]
    before = model.state_dict()

    def gradient():
        model.train()
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=ids).loss.backward()
        return embeddings.grad

    first = gradient()
    model.eval()
    with torch.no_grad():
        evaluated = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, evaluated)
    assert torch.equal(gradient(), first)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# Embeddings in host memory


def test_embeddings_on_the_cpu_change_nothing(tiny_folder, tmp_path, logits):
    plain = load_model(tiny_folder, quantization="nf4")
    model = load_model(tiny_folder, quantization="nf4", embeddings_on_cpu=True)
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert torch.equal(logits(model), logits(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    # Transformers takes the first parameter's device for the model's.
    assert next(iter(model.named_parameters()))[0] == "transformer.h.0.ln_1.weight"
    model.save_pretrained(tmp_path)
    same_bits(load_model(tmp_path), plain)
    assert isinstance(load_model(tiny_folder, embeddings_on_cpu=True).get_input_embeddings(), HostEmbedding)


def test_the_table_keeps_its_place_and_takes_a_type():
    table = HostEmbedding(10, 4)
    moved = table.to(torch.bfloat16)
    assert moved is table and table.weight.dtype == torch.bfloat16 and table.weight.device.type == "cpu"
    assert table(torch.tensor([[1, 2]])).shape == (1, 2, 4)


@pytest.mark.gpu
def test_on_the_gpu(tiny_folder, logits, expected):
    """The magnitudes of some blocks are rounded to the next code there: 0.0003 of the logits on an H200."""
    model = load_model(tiny_folder, quantization="nf4", embeddings_on_cpu=True).cuda()
    assert model.device.type == "cuda" and model.get_input_embeddings().weight.device.type == "cpu"
    ids = expected["one_image.input_ids"][None].cuda()
    with torch.no_grad():
        ours = model(input_ids=ids, pixel_values=expected["pixel_values"][:1].cuda()).logits
    reference = logits(load_model(tiny_folder, quantization="nf4", device_map="cpu"))
    assert (ours.cpu() - reference).norm() <= 1e-3 * reference.norm()


# Adapters


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    """An adapter trained on the language model and the vision tower in 4 bits, and the model it was saved from."""
    model = load_model(tiny_folder, quantization="nf4", quantize=["language", "vision"])
    model = train_a_little(get_peft_model(model, LoraConfig(**PUBLISHED_LORA)))
    folder = tmp_path / "run" / "adapter"
    model.save_pretrained(folder)
    note_base(folder, tiny_folder, identify_base(tiny_folder), quantize=["language", "vision"])
    return folder, model


def test_an_adapter_finds_its_base_in_4_bits_as_it_was_trained(adapter, logits):
    folder, model = adapter
    assert read_record(folder).quantize == ("language", "vision")
    for path in (folder, folder.parent):
        same_bits(load_model(path), model)
        same_bits(load_model(path, quantization="nf4"), model)
    assert not in_4_bits(load_model(folder, quantization="none"))
    assert len(in_4_bits(load_model(folder, quantization="nf4", quantize=["language"]))) == 10


def test_an_adapter_on_a_4_bit_folder(adapter, tiny_folder, tmp_path, logits):
    folder, model = adapter
    saved = tmp_path / "saved"
    base = load_model(tiny_folder, quantization="nf4", quantize=["language", "vision"])
    base.save_pretrained(saved)
    with pytest.raises(ValueError, match="other weights"):
        load_model(saved, adapter=folder)
    # With its base noted, the folder is the base; until its weights are touched.
    identity = identify_base(tiny_folder)
    own = weights_fingerprint(saved)
    note_base(saved, tiny_folder, identity, quantize=["language", "vision"], own=own)
    assert identify_base(saved).weights == identity.weights != own
    same_bits(load_model(saved, adapter=folder), model)
    base.transformer.ln_f.weight.data += 1
    base.save_pretrained(saved)
    assert identify_base(saved).weights not in (identity.weights, own)


# What is wrong


def test_contradictions_are_named(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="int8"):
        load_model(tiny_folder, quantization="int8")
    with pytest.raises(InputError, match="no effect"):
        load_model(tiny_folder, quantize=["language"])
    load_model(tiny_folder, quantization="nf4").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"in 4 bits already: language\. .* as language, head"):
        find_parts(str(tmp_path), "nf4", ["language", "head"])


def test_bitsandbytes_is_asked_for(tiny_folder, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        quantization.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else original(name)
    )
    with pytest.raises(InputError, match=r"pip install 'bitsandbytes>="):
        load_model(tiny_folder, quantization="nf4")
    assert load_model(tiny_folder).dtype == torch.float32


# Memory


def live_bytes() -> int:
    """Bytes of all float tensors that somebody holds, each storage once; libraries keep fake ones, without memory."""
    tensors = [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]
    tensors = [held for held in tensors if held.device.type == "cpu" and not isinstance(held, FakeTensor)]
    storages = [held.untyped_storage() for held in tensors if held.dtype.is_floating_point]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_weights_are_held_one_at_a_time(tiny_folder, tmp_path, monkeypatch):
    """While a weight is quantised, none of the others is there but those that stay as they are."""
    folder = store(tiny_folder, tmp_path / "copy", "sharded safetensors")
    sizes = {name: tensor.nbytes for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    quantized = quantized_names(QwenVLConfig.from_pretrained(folder), ("language",))
    stays = sum(size for name, size in sizes.items() if name not in quantized)
    largest = max(sizes[name] for name in quantized)
    gc.collect()
    before, live, original = live_bytes(), [], bitsandbytes.functional.quantize_4bit

    def counted(values, **settings):
        live.append(live_bytes() - before)
        return original(values, **settings)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", counted)
    load_model(folder, quantization="nf4")
    assert len(live) == len(quantized)
    assert max(live) <= stays + 2 * largest < sum(sizes.values())


def test_a_record_of_another_folder_is_refused(adapter, tiny_folder, tmp_path):
    folder, _ = adapter
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    shutil.copy(folder / "qwenvl.json", copy / "qwenvl.json")
    with pytest.raises(InputError, match=r"quantize names language, vision, and the folder holds no 4-bit weights"):
        load_model(copy)
