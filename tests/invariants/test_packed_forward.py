"""Sequences packed into one row give the numbers that they give apart."""

import pytest
import torch

from qwenvl import InputError


def pack(*rows: torch.Tensor):
    """Rows of ids as one row, with positions that restart."""
    return torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]


@pytest.fixture
def rows(expected):
    return expected["one_image.input_ids"], expected["text_only.input_ids"], expected["two_images.input_ids"]


def test_packed_equals_apart_in_training(tiny_model, expected, rows):
    tiny_model.train()
    pixels = expected["pixel_values"]
    ids, positions = pack(*rows)
    labels = ids.clone()
    labels[positions == 0] = -100
    packed = tiny_model(ids, position_ids=positions, pixel_values=pixels[[0, 1, 3]], labels=labels)
    packed.loss.backward()
    packed_gradients = {name: parameter.grad.clone() for name, parameter in tiny_model.named_parameters()}

    tiny_model.zero_grad()
    # Image placeholders are never a target.
    supervised = sum(int((row[1:] != tiny_model.config.image_token_id).sum()) for row in rows)
    total = 0.0
    for row, images in zip(rows, ([0], [], [1, 3]), strict=True):
        apart = tiny_model(
            row[None],
            pixel_values=pixels[images] if images else None,
            labels=row[None],
            num_items_in_batch=supervised,
        )
        apart.loss.backward()
        total += apart.loss.item()
    assert packed.loss.item() == pytest.approx(total, abs=1e-6)
    for name, parameter in tiny_model.named_parameters():
        scale = parameter.grad.abs().max()
        assert (packed_gradients[name] - parameter.grad).abs().max() <= 1e-5 * scale + 1e-9, name


def test_packed_equals_apart_in_eval_beyond_seq_length(tiny_model, expected, rows):
    """Each sequence has its own rotary stretch and log-n factors."""
    long = expected["long.input_ids"]
    ids, positions = pack(rows[1], long, rows[1])
    with torch.no_grad():
        packed = tiny_model(ids, position_ids=positions).logits[0]
        apart = torch.cat([tiny_model(row[None]).logits[0] for row in (rows[1], long, rows[1])])
    assert (packed - apart).abs().max() < 2e-5


def test_a_pack_beside_a_cache_or_a_mask_is_refused(tiny_model, rows):
    ids, positions = pack(rows[1], rows[1])
    with pytest.raises(InputError, match="cache"):
        tiny_model(ids, position_ids=positions, use_cache=True)
    with pytest.raises(InputError, match="attention_mask=None"):
        tiny_model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)


def test_padding_on_either_side_changes_nothing(tiny_model, expected, rows):
    row, pixels = rows[0], expected["pixel_values"][:1]
    padding = torch.full((40,), 512)
    with torch.no_grad():
        alone = tiny_model(row[None], pixel_values=pixels).logits[0]
        for parts in ((padding, row), (row, padding)):
            ids = torch.cat(parts)[None]
            mask = torch.cat([torch.zeros_like(part) if part is padding else torch.ones_like(part) for part in parts])
            logits = tiny_model(ids, attention_mask=mask[None], pixel_values=pixels).logits[0]
            assert (logits[mask.bool()] - alone).abs().max() < 1e-5


def test_gradient_checkpointing_changes_nothing(tiny_model, expected):
    batch = {
        "input_ids": expected["sft.input_ids"],
        "attention_mask": expected["sft.attention_mask"],
        "labels": expected["sft.labels_assistant"],
        "pixel_values": expected["pixel_values"][[0, 2, 4]],
    }
    tiny_model.train()
    gradients = []
    for checkpointing in (False, True):
        tiny_model.zero_grad()
        if checkpointing:
            tiny_model.gradient_checkpointing_enable()
        tiny_model(**batch).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in tiny_model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
