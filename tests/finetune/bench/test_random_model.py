"""A model with random weights is the one that loading would give, but for its values."""

import pytest
import torch

from finetune.bench.random_model import make_random_model
from qwenvl import QwenVLConfig, load_model
from qwenvl.model.host_embedding import HostEmbedding


@pytest.fixture(scope="module")
def config(tiny_folder) -> QwenVLConfig:
    return QwenVLConfig.from_pretrained(tiny_folder)


def layout(model) -> dict[str, tuple]:
    """Of all that a model holds; the text in which bitsandbytes keeps an offset has as many digits as that needs."""
    return {
        name: (None if name.endswith("bitsandbytes__nf4") else tensor.shape, tensor.dtype, tensor.device)
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("parts", [(), ("language",), ("language", "vision", "head")])
def test_it_has_the_layout_of_a_loaded_one(tiny_folder, config, parts):
    made = make_random_model(config, device="cpu", dtype=torch.float32, parts=parts)
    how = {"quantization": "nf4", "quantize": parts, "device_map": "cpu"} if parts else {}
    loaded = load_model(tiny_folder, dtype="float32", **how)
    assert layout(made) == layout(loaded)
    kinds = [[type(module) for module in model.modules()] for model in (made, loaded)]
    assert kinds[0] == kinds[1]
    assert not made.training and made.dtype == torch.float32
    assert getattr(made, "is_loaded_in_4bit", False) == bool(parts)
    assert getattr(config, "quantization_config", None) is None


@pytest.mark.parametrize("parts", [(), ("language",)])
def test_it_computes_and_its_seed_decides(config, parts):
    def logits(seed: int) -> torch.Tensor:
        model = make_random_model(config, device="cpu", dtype=torch.float32, parts=parts, seed=seed)
        with torch.no_grad():
            return model(torch.arange(20)[None]).logits

    first = logits(0)
    assert first.isfinite().all() and first.std() > 0
    assert torch.equal(first, logits(0)) and not torch.equal(first, logits(1))


def test_embeddings_may_stay_in_host_memory(config):
    model = make_random_model(config, device="cpu", dtype=torch.bfloat16, embeddings_on_cpu=True)
    assert isinstance(model.transformer.wte, HostEmbedding)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_drawing_leaves_the_random_state_alone(config):
    before = torch.get_rng_state()
    make_random_model(config, device="cpu", dtype=torch.float32)
    assert torch.equal(before, torch.get_rng_state())
