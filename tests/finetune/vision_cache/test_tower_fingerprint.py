"""Features of one tower are not taken for another's: what the fingerprint follows, and what it does not."""

import pytest
import torch

from finetune.vision_cache.tower_fingerprint import tower_fingerprint
from qwenvl import QwenVLForConditionalGeneration, load_model

CPU = torch.device("cpu")


@pytest.fixture
def before(tiny_model):
    return tower_fingerprint(tiny_model, CPU)


def test_the_same_for_the_same_tower(tiny_folder, tiny_model, before):
    with torch.no_grad():
        tiny_model.lm_head.weight.add_(1)
        tiny_model.transformer.h[0].ln_1.weight.add_(1)
    assert tower_fingerprint(tiny_model, CPU) == before
    assert tower_fingerprint(QwenVLForConditionalGeneration.from_pretrained(tiny_folder), CPU) == before


def test_every_weight_counts_wherever_it_is(tiny_model, before):
    """The smallest change of one value in the middle of each tensor, buffers too."""
    seen = {before}
    for tensor in tiny_model.transformer.visual.state_dict().values():
        flat = tensor.view(-1)
        kept = flat[len(flat) // 3].clone()
        flat[len(flat) // 3] = torch.nextafter(kept, kept + 1)
        seen.add(tower_fingerprint(tiny_model, CPU))
        flat[len(flat) // 3] = kept
    assert len(seen) == 1 + len(tiny_model.transformer.visual.state_dict())
    assert tower_fingerprint(tiny_model, CPU) == before


def test_the_way_it_is_computed_counts(tiny_model, tiny_folder, before):
    seen = {before, tower_fingerprint(tiny_model, torch.device("cuda"))}
    seen.add(tower_fingerprint(tiny_model.to(torch.bfloat16), CPU))
    tiny_model.float().set_attn_implementation("eager")
    seen.add(tower_fingerprint(tiny_model, CPU))
    assert len(seen) == 4
    quantized = [
        load_model(tiny_folder, quantization="nf4", quantize=parts, dtype=dtype)
        for parts in (("language",), ("language", "vision"))
        for dtype in ("float32", "bfloat16")
    ]
    four = [tower_fingerprint(model, CPU) for model in quantized]
    assert four[0] == before, "4 bits elsewhere change nothing here"
    assert len({*four, *seen}) == len(seen) + 2, "the others are their own, but for bfloat16 with a plain tower"
