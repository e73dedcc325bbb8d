"""Arithmetic and memory traffic of one training step of the language model at the published sizes, on shapes alone.

    python -m examples.step_traffic [--tokens 4096] [--dropout 0.05]

Runs on any machine in seconds: the model is on the meta device, and every operation that PyTorch dispatches is counted
with the bytes that it reads and writes. A GPU adds kernels of its own, and fused ones count as what they replace, so
this is no time; but it shows what must not be there: products in float32, and passes over activations around adapters.
Products (`mm`, `addmm`) count by their arithmetic, everything else by its bytes. Attention is one read of q, k, v and
one write. Limits are those of an H200: 989 TFLOP/s in bf16, 67 in float32, 4.8 TB/s.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from finetune.model.adapters import put_lora
from finetune.model.lora_products import multiply_as_peft
from finetune.recipe.sections import Adapter, Freeze
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from qwenvl.model import modeling

PUBLISHED: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
}
PRODUCTS = ("mm", "addmm", "addmm_")
FREE = frozenset(
    {
        *("detach", "empty", "empty_like", "empty_strided", "new_empty", "alias", "t", "transpose", "view"),
        *("_unsafe_view", "expand", "permute", "split", "unbind", "select", "slice", "as_strided"),
        *("unsqueeze", "squeeze"),
    }
)

Adapt = Callable[[QwenVLForConditionalGeneration], nn.Module]


class Attention(torch.autograd.Function):
    """Stands for a fused attention kernel."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        like = gradients[0]
        return torch.empty_like(like), torch.empty_like(like), torch.empty_like(like)


class Count(TorchDispatchMode):
    """Counts operations: of products 2 per multiplication and addition, by type; of the others bytes, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()
        self.traffic: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if operation.is_view or name in FREE:
            return result
        if name in PRODUCTS:
            left, right = args[-2:]
            self.flops[left.dtype] += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        else:
            tensors = [one for one in tree_flatten((args, kwargs, result))[0] if isinstance(one, torch.Tensor)]
            self.traffic[name] += sum(one.numel() * one.element_size() for one in tensors)
        return result

    @property
    def gigabytes(self) -> float:
        return sum(self.traffic.values()) / 1e9

    def __str__(self) -> str:
        narrow, wide = self.flops[torch.bfloat16] / 1e12, self.flops[torch.float32] / 1e12
        return (
            f"{narrow:6.1f} TFLOP bf16, {wide:5.2f} TFLOP float32, {self.gigabytes:6.1f} GB outside of products; "
            f"at the card's limits {narrow / 0.989 + wide / 0.067:4.0f} + {self.gigabytes / 4.8:4.0f} ms"
        )


def count(tokens: int, adapt: Adapt | None) -> Count:
    """Forward and backward of one row of tokens.

    Args:
        adapt: makes the model what is trained; None counts the frozen base, with gradients of its input.
    """
    config = QwenVLConfig(**PUBLISHED)
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(config).bfloat16()
    model.set_attn_implementation("sdpa")
    model.requires_grad_(False)
    trained = model if adapt is None else adapt(model)
    trained.train()
    hidden = torch.zeros(
        1, tokens, config.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=adapt is None
    )

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        result: torch.Tensor = Attention.apply(q, k, v)
        return result

    with (
        mock.patch.object(modeling, "create_causal_mask", lambda **_: None),
        mock.patch.object(modeling, "is_packed", lambda *_: False),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", attention),
        Count() as counted,
    ):
        model.transformer(inputs_embeds=hidden, use_cache=False).last_hidden_state.sum().backward()
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dropout", type=float, default=0.05)
    arguments = parser.parse_args()
    adapter = Adapter(dropout=arguments.dropout)

    def as_trained(model: QwenVLForConditionalGeneration) -> nn.Module:
        return put_lora(model, adapter, Freeze(), embeddings=False)

    def as_peft(model: QwenVLForConditionalGeneration) -> nn.Module:
        adapted = as_trained(model)
        multiply_as_peft(adapted)
        return adapted

    base = count(arguments.tokens, None)
    print(f"{'frozen base':<16} {base}")
    for name, adapt in (("adapter by PEFT", as_peft), ("adapter", as_trained)):
        whole = count(arguments.tokens, adapt)
        print(f"{name:<16} {whole}")
        print(
            f"{'':<16} most traffic:", ", ".join(f"{key} {n / 1e9:.0f} GB" for key, n in whole.traffic.most_common(6))
        )
        own = whole.gigabytes - base.gigabytes
        print(f"{'':<16} its own: {own:.0f} GB, {whole.flops[torch.float32] / 1e12:.2f} TFLOP in float32")


if __name__ == "__main__":
    main()
