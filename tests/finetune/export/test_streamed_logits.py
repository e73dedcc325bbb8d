"""Logits computed layer by layer from files are those of the loaded model."""

import torch
from recipes_for_tests import TINY

from finetune.export.streamed_logits import GivenRow, streamed_logits
from qwenvl import QwenVLConfig, load_model
from qwenvl.checkpoint.checkpoint_files import locate_tensors


@torch.inference_mode()
def test_streamed_logits_are_the_models(tiny_images):
    config = QwenVLConfig.from_pretrained(TINY, attn_implementation="sdpa")
    model = load_model(TINY, dtype="float32")
    features = torch.randn(2, config.n_queries, config.hidden_size, generator=torch.Generator().manual_seed(0))
    span = [config.image_start_id, *[config.image_token_id] * config.n_queries, config.image_end_id]
    rows = [GivenRow([5, 9, *span, 17, *span, 3, 4], features, 3), GivenRow([*range(40)], None, 7)]
    found = streamed_logits(config, locate_tensors(TINY), rows)
    for row, logits in zip(rows, found, strict=True):
        expected = model(torch.tensor([row.ids]), image_features=row.features).logits[0, -row.last :]
        assert logits.shape == (row.last, config.vocab_size)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
        assert expected.std() > 0.1
