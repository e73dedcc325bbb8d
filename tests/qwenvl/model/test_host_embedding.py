"""Embeddings that are read straight into host memory: the same values, and never on the model's device."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl import InputError, QwenVLForConditionalGeneration, load_model
from qwenvl.model.host_embedding import TABLE, HostEmbedding, WithoutEmbeddings


@pytest.fixture
def stored(tiny_model, tmp_path):
    """The tiny checkpoint, in safetensors."""
    tiny_model.save_pretrained(tmp_path)
    return tmp_path


def test_reading_the_model_leaves_them_out(tiny_folder):
    model, told = WithoutEmbeddings.from_pretrained(tiny_folder, output_loading_info=True)
    assert TABLE not in model.state_dict()
    assert not any(told.values())  # nothing is missing, and the table is not called unexpected


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_values_and_types_are_those_of_the_whole_model(tiny_folder, dtype, quantization):
    whole = load_model(tiny_folder, dtype=dtype, quantization=quantization)
    model = load_model(tiny_folder, dtype=dtype, quantization=quantization, embeddings_on_cpu=True)
    assert type(model) is QwenVLForConditionalGeneration and model.dtype == whole.dtype
    ours, theirs = model.get_input_embeddings(), whole.get_input_embeddings()
    assert isinstance(ours, HostEmbedding) and ours.weight.requires_grad == theirs.weight.requires_grad
    assert ours.weight.dtype == theirs.weight.dtype and torch.equal(ours.weight, theirs.weight)


def test_a_checkpoint_without_them(stored):
    tensors = load_file(stored / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != TABLE}, stored / "model.safetensors")
    with pytest.raises(InputError, match=rf"{TABLE} is missing from its weights"):
        load_model(stored, embeddings_on_cpu=True)


def test_what_is_saved_is_an_ordinary_checkpoint(tiny_folder, tmp_path):
    load_model(tiny_folder, embeddings_on_cpu=True).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["QwenVLForConditionalGeneration"]
    assert torch.equal(
        load_model(tmp_path).get_input_embeddings().weight, load_model(tiny_folder).get_input_embeddings().weight
    )


@pytest.mark.gpu
def test_they_never_come_to_the_gpu(tmp_path, tiny_model):
    """A table larger than all the rest, of which the load would show."""
    config = tiny_model.config
    config.vocab_size = 200_000  # 205 MB in float32, for table and head each
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(config)
    model.to_empty(device="cpu").to(torch.float32).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(tmp_path, embeddings_on_cpu=True, device_map="cuda")
    held = sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.is_cuda)
    assert torch.cuda.max_memory_allocated() - before < held + 50_000_000
