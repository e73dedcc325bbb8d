"""The logits of a checkpoint's language model, computed layer by layer from its files.

One layer at a time is in memory, so that a model can be checked against its export on a machine that holds neither.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qwenvl import QwenVLConfig
from qwenvl.checkpoint.checkpoint_files import StoredTensor
from qwenvl.model.image_span import place_image_features
from qwenvl.model.language import Block, RMSNorm
from qwenvl.model.rotary import rotary_positions

HEAD_ROWS = 8192
"""Rows of the output head in memory at once."""


@dataclass(frozen=True)
class GivenRow:
    """A prompt and its reply.

    Attributes:
        ids: (length,) tokens.
        features: (images, n_queries, hidden) of its images; None without.
        last: how many last positions' logits are wanted.
    """

    ids: Sequence[int]
    features: torch.Tensor | None
    last: int


@torch.inference_mode()
def streamed_logits(
    config: QwenVLConfig, stored: Mapping[str, StoredTensor], rows: Sequence[GivenRow]
) -> list[torch.Tensor]:
    """Compute logits in float32, without the extensions beyond `seq_length` tokens.

    Args:
        config: with "sdpa" attention.
        stored: the tensors of the whole checkpoint.
        rows: at most `seq_length` tokens each.

    Returns:
        For each row (last, vocabulary).
    """
    assert all(len(row.ids) <= config.seq_length for row in rows), "the extensions are not computed"
    hidden = [_embedded(config, stored, row) for row in rows]
    tables = [
        rotary_positions(torch.arange(len(row.ids))[None], head_dim=config.kv_channels, base=config.rotary_emb_base)
        for row in rows
    ]
    for layer in range(config.num_hidden_layers):
        with torch.device("meta"):
            block = Block(config, layer)
        _load(block, stored, f"transformer.h.{layer}.")
        hidden = [block(x, positions=table) for x, table in zip(hidden, tables, strict=True)]
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
    _load(norm, stored, "transformer.ln_f.")
    ends = torch.cat([norm(x)[0, -row.last :] for x, row in zip(hidden, rows, strict=True)])
    logits = torch.cat([ends @ piece.T for piece in _pieces(stored["lm_head.weight"])], dim=1)
    return list(logits.split([row.last for row in rows]))


def _embedded(config: QwenVLConfig, stored: Mapping[str, StoredTensor], row: GivenRow) -> torch.Tensor:
    ids = torch.tensor([list(row.ids)])
    distinct, places = ids.unique(return_inverse=True)
    table = stored["transformer.wte.weight"]
    vectors = torch.cat([table.read(token, token + 1) for token in distinct.tolist()]).float()[places]
    return place_image_features(vectors, ids, row.features, config)


def _load(module: nn.Module, stored: Mapping[str, StoredTensor], prefix: str) -> None:
    weights = {name: stored[prefix + name].read().float() for name in module.state_dict()}
    module.load_state_dict(weights, assign=True)
    module.eval()


def _pieces(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    for start in range(0, tensor.shape[0], HEAD_ROWS):
        yield tensor.read(start, start + HEAD_ROWS).float()
