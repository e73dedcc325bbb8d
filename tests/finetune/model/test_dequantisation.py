"""A pack reads each 4-bit weight once a pass: forward, again where layers are computed anew, and backward; the head
twice, for the loss and for its gradient, however many rows are supervised."""

from collections import Counter

import pytest
import torch
from recipes_for_tests import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.model.adapters import put_lora
from finetune.model.recomputation import set_recomputation
from finetune.recipe.sections import Adapter, Freeze
from qwenvl import load_model
from qwenvl.model.loss import supervised_loss
from qwenvl.model.nf4_weights import is_quantized
from qwenvl.model.varlen_attention import VARLEN
from qwenvl.text.chat import IGNORED

# Operations of bitsandbytes that read a whole 4-bit weight, and which argument it is.
READING = {"bitsandbytes::gemm_4bit": 1, "bitsandbytes::gemv_4bit": 1, "bitsandbytes::dequantize_4bit": 0}


class Readings(TorchDispatchMode):
    """How often each weight was dequantised, by where its codes lie."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        place = READING.get(function._schema.name)
        if place is not None:
            self.of[args[place].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def pack(expected):
    rows = [expected[f"{name}.input_ids"] for name in ("one_image", "text_only", "two_images")]
    ids = torch.cat(rows)[None]
    labels = ids.clone()
    labels[0, [0, len(rows[0]), len(rows[0]) + len(rows[1])]] = IGNORED
    return {
        "input_ids": ids,
        "labels": labels,
        "sequence_lengths": [len(row) for row in rows],
        "pixel_values": expected["pixel_values"][[0, 1, 3]],
    }


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["none", "selective", "full", "offload"])
def test_readings_of_a_step(pack, kind, dora, monkeypatch):
    model = load_model(TINY, quantization="nf4", quantize=("language", "vision", "head"), dtype="float32")
    model.set_attn_implementation(VARLEN)
    monkeypatch.setitem(supervised_loss.__kwdefaults__, "chunk", 7)
    adapter = Adapter(r=4, dropout=0.0, dora=dora, targets=["c_attn", "attn.c_proj", "w1", "w2"])
    model = put_lora(model, adapter, Freeze(), embeddings=False).train()
    set_recomputation(model, kind)
    names = {module.weight.data_ptr(): name for name, module in model.named_modules() if is_quantized(module)}
    assert any(name.endswith("lm_head") for name in names.values())
    with Readings() as readings:
        loss = model(**pack, skip_logits=True, use_cache=False).loss
    assert set(readings.of) == set(names)
    for place, name in names.items():
        measured = dora and name.endswith("base_layer")  # DoRA takes the norm of weight and adapter together
        assert readings.of[place] == 1 + measured + name.endswith("lm_head"), name
    forward, readings.of = readings.of, Counter()
    with readings:
        loss.backward()
    for place, name in names.items():
        where = name.removeprefix("base_model.model.transformer.")
        is_in_block = where.startswith("h.")
        # The head's gradient was made beside the loss; images and the first layer's input are not trained.
        backward = is_in_block and not where.startswith("h.0.attn.c_attn")
        # PyTorch stops when all is there that backward reads: the last linear's output is not.
        anew = is_in_block and kind != "none" and not where.endswith("mlp.c_proj")
        assert readings.of[place] == backward + anew * forward[place], name
