"""Agreement with the published implementation, number by number (float32, CPU).

The expected numbers come from the published Qwen-VL code on `examples/tiny`: see `tests/conftest.py`.
"""

import pytest
import torch

from qwenvl import QwenVLForConditionalGeneration
from qwenvl.text.chat import render_chat, render_prompt


def every_nth(ours: torch.Tensor, theirs: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The rows of `ours` that the thinned `theirs` holds."""
    step = -(-ours.shape[dim] // theirs.shape[dim])
    return ours.index_select(dim, torch.arange(0, ours.shape[dim], step))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (every_nth(ours, theirs) - theirs).abs().max().item()


@pytest.fixture(params=["eager", "sdpa"])
def model(request, tiny_folder):
    return QwenVLForConditionalGeneration.from_pretrained(tiny_folder, attn_implementation=request.param).eval()


def test_pixel_values(tiny_processor, tiny_images, published_pixels):
    ours = tiny_processor.image_processor(tiny_images, return_tensors="pt")["pixel_values"]
    assert (ours - published_pixels).abs().max() <= 1e-6


def test_image_features(model, expected):
    with torch.no_grad():
        ours = model.get_image_features(expected["pixel_values"])
    assert (every_nth(ours, expected["image_features"], dim=1) - expected["image_features"]).abs().max() <= 1e-5


@pytest.mark.parametrize(("case", "images"), [("text_only", []), ("one_image", [0]), ("two_images", [1, 3])])
def test_logits(model, expected, case, images):
    pixel_values = expected["pixel_values"][images] if images else None
    with torch.no_grad():
        logits = model(expected[f"{case}.input_ids"][None], pixel_values=pixel_values).logits[0]
    assert difference(logits, expected[f"{case}.logits"]) <= 1e-4


def test_logits_beyond_seq_length(model, expected):
    """Dynamic NTK and log-n attention are on: 1,033 tokens, seq_length 700."""
    with torch.no_grad():
        logits = model(expected["long.input_ids"][None]).logits[0]
    assert difference(logits[:8], expected["long.logits_first8"]) <= 1e-4
    assert difference(logits[-64:], expected["long.logits_last64"]) <= 1e-4


def test_greedy_tokens(model, expected):
    ids = model.generate(
        expected["chat.input_ids"][None],
        pixel_values=expected["pixel_values"][:1],
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
    )
    assert ids[0, -24:].tolist() == expected["chat.greedy"].tolist()


@pytest.mark.parametrize("rule", ["structure", "assistant"])
def test_loss_and_gradients(model, expected, expected_json, rule):
    model.train()
    outputs = model(
        expected["sft.input_ids"],
        attention_mask=expected["sft.attention_mask"],
        labels=expected[f"sft.labels_{rule}"],
        pixel_values=expected["pixel_values"][[0, 2, 4]],
    )
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(expected_json["sft"][f"loss_{rule}"], abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = expected_json["sft"][f"grad_norms_{rule}"]
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    if rule == "assistant":
        for key in [key for key in expected if key.startswith("sft.grad.")]:
            assert difference(gradients[key.removeprefix("sft.grad.")], expected[key]) <= 1e-5, key


def test_chat_ids(tiny_processor, expected, expected_json):
    chat = expected_json["chat"]
    messages = [{"role": "system", "content": chat["system"]}]
    for question, answer in chat["history"]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = [{"type": "image", **part} if "image" in part else {"type": "text", **part} for part in chat["query_list"]]
    messages.append({"role": "user", "content": parts})
    rendered = render_chat(messages, tiny_processor.tokenizer, add_generation_prompt=True)
    assert rendered.ids == expected["chat.input_ids"].tolist()
    assert rendered.images == ["images/a.png"]


def qwen_json_parts(value: str) -> list[dict]:
    """`Picture 1: <img>path</img>\\ntext` of the published data format, as message parts."""
    parts = []
    for index, piece in enumerate(value.replace("</img>", "<img>").split("<img>")):
        if index % 2:
            parts.append({"type": "image", "image": piece, "numbered": False})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


@pytest.mark.parametrize("rule", ["structure", "assistant"])
def test_training_ids_and_labels(tiny_processor, expected, expected_json, rule):
    for row, conversation in enumerate(expected_json["sft"]["conversations"]):
        messages = [{"role": turn["from"], "content": qwen_json_parts(turn["value"])} for turn in conversation]
        rendered = render_chat(messages, tiny_processor.tokenizer, labels=rule, grounding=True)
        real = expected["sft.attention_mask"][row].bool()
        assert rendered.ids == expected["sft.input_ids"][row][real].tolist()
        assert rendered.labels == expected[f"sft.labels_{rule}"][row][real].tolist()


@pytest.mark.parametrize("case", ["text_only", "one_image", "two_images"])
def test_raw_prompt_ids(tiny_processor, expected, expected_json, case):
    rendered = render_prompt(qwen_json_parts(expected_json[case]["text"]), tiny_processor.tokenizer, grounding=True)
    assert rendered.ids == expected[f"{case}.input_ids"].tolist()
