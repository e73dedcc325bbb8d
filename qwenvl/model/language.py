"""The language model's parts: RMSNorm, attention, MLP and the block made of them."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl.model.attention import AttentionLayer, attend
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.rotary import Positions, rotate, scale_by_log_n


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and cast to x's dtype before the weight is applied."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(AttentionLayer):
    """Causal self-attention. `c_attn`'s output is q | k | v in thirds; only `c_attn` has a bias."""

    is_causal = True

    def __init__(self, config: QwenVLConfig, layer_idx: int) -> None:
        super().__init__(config)
        width = config.num_attention_heads * config.kv_channels
        self.layer_idx = layer_idx
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        *,
        positions: Positions,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x: (batch, length, hidden) -> the same shape, and the attention weights if the kernel returns them."""
        qkv = self.c_attn(x).unflatten(-1, (3, self.config.num_attention_heads, self.config.kv_channels))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        query, key = self.rotate(query, key, positions)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=self.config.attn_dropout_prob, **kwargs
        )
        return self.c_proj(output), weights

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate query and key (batch, heads, length, head_dim) to their positions; scale the query by log-n."""
        return scale_by_log_n(rotate(query, positions), positions), rotate(key, positions)


class MLP(nn.Module):
    """SwiGLU: `w2` is the gate, `w1` the value."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.gated(x))

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, hidden) -> (batch, length, inner)."""
        gate, value = self.gate_and_value(x)
        return value * nn.functional.silu(gate)

    def gate_and_value(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (batch, length, hidden) -> twice (batch, length, inner)."""
        value = self.w1(x)
        return self.w2(x), value


class Block(GradientCheckpointingLayer):
    """One pre-norm decoder layer."""

    def __init__(self, config: QwenVLConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        positions: Positions,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """x: (batch, length, hidden) -> the same shape."""
        attended, _ = self.attn(
            self.ln_1(x), positions=positions, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        x = x + attended
        return x + self.mlp(self.ln_2(x))
