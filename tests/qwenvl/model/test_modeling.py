import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qwenvl import InputError, QwenVLConfig, QwenVLForConditionalGeneration
from qwenvl.model.resampler import resize_grid, sine_cosine_grid

LAYOUT = Path(__file__).parents[2] / "data" / "checkpoint_layout.json"


def test_full_size_has_the_published_tensors():
    """Names and shapes of the published Qwen-VL checkpoint, listed in checkpoint_layout.json."""
    layout = json.loads(LAYOUT.read_text())
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(QwenVLConfig())
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == layout["tensors"]
    assert len(ours) == 853
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 9_656_935_168


def test_fresh_weights(tiny_folder):
    torch.manual_seed(0)
    model = QwenVLForConditionalGeneration(QwenVLConfig.from_pretrained(tiny_folder))
    visual = model.transformer.visual
    assert torch.equal(visual.attn_pool.pos_embed, sine_cosine_grid(16, 256))
    for weight, std in [
        (model.transformer.h[0].attn.c_attn.weight, 0.02),
        (visual.attn_pool.query, 0.02),
        (visual.attn_pool.attn.in_proj_weight, 0.02),
        (visual.transformer.resblocks[0].mlp.c_fc.weight, 0.02),
        (visual.proj, 256**-0.5),
        (visual.positional_embedding, 64**-0.5),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            assert (tensor == 0).all(), name


def test_the_position_table_of_the_checkpoint_is_the_formula(tiny_model):
    """The published file holds the table; it was made by the published code."""
    stored = tiny_model.transformer.visual.attn_pool.pos_embed
    assert (stored - sine_cosine_grid(16, stored.shape[1])).abs().max() < 1e-6
    assert "transformer.visual.attn_pool.pos_embed" not in dict(tiny_model.named_parameters())


def test_a_grid_of_its_own_size_is_left_alone():
    table = torch.randn(256, 8)
    assert resize_grid(table, patches=256) is table
    assert resize_grid(table, patches=1024).shape == (1024, 8)


def test_uint8_pixels_are_normalised_in_the_model(tiny_model, tiny_processor, tiny_images):
    floats = tiny_processor.image_processor(tiny_images, return_tensors="pt")["pixel_values"]
    bytes_ = tiny_processor.image_processor(tiny_images, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert bytes_.dtype == torch.uint8
    with torch.no_grad():
        difference = tiny_model.get_image_features(bytes_) - tiny_model.get_image_features(floats)
    assert difference.abs().max() <= 1e-5


def test_another_resolution_resizes_the_positions(tiny_model):
    with torch.no_grad():
        assert tiny_model.get_image_features(torch.randn(1, 3, 56, 56)).shape == (1, 256, 256)


@pytest.mark.parametrize("shape", [(3, 112, 112), (1, 1, 112, 112), (1, 3, 112, 98), (1, 3, 113, 113)])
def test_wrong_pixels_are_named(tiny_model, shape):
    with pytest.raises(InputError, match="pixel_values"):
        tiny_model.get_image_features(torch.zeros(shape))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", ["full", "lora"])
def test_the_vision_side_gets_gradients_when_trained(tiny_model, expected, training, checkpointing):
    """In full, and beside LoRA on the language model; the features are placed out of place."""
    model, prefix = tiny_model, ""
    if training == "lora":
        model = get_peft_model(tiny_model, LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"))
        model.base_model.model.transformer.visual.requires_grad_(True)
        prefix = "base_model.model."
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    labels = expected["sft.labels_assistant"]
    model(
        input_ids=expected["sft.input_ids"],
        attention_mask=expected["sft.attention_mask"],
        labels=labels,
        pixel_values=expected["pixel_values"][[0, 2, 4]],
    ).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    visual = {name: grad for name, grad in gradients.items() if name.startswith(f"{prefix}transformer.visual.")}
    assert len(visual) == 41
    for name, gradient in visual.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
    query = visual[f"{prefix}transformer.visual.attn_pool.query"]
    theirs = expected["sft.grad.transformer.visual.attn_pool.query"]
    assert (query[::8] - theirs).abs().max() <= 1e-5


def test_a_frozen_vision_side_gets_none(tiny_model, expected):
    tiny_model.transformer.visual.requires_grad_(False)
    tiny_model.train()
    tiny_model(
        expected["one_image.input_ids"][None],
        pixel_values=expected["pixel_values"][:1],
        labels=expected["one_image.input_ids"][None],
    ).loss.backward()
    assert all(parameter.grad is None for parameter in tiny_model.transformer.visual.parameters())
    assert tiny_model.transformer.wte.weight.grad.abs().sum() > 0


def test_cached_features_equal_pixels(tiny_model, expected):
    ids, pixels = expected["two_images.input_ids"][None], expected["pixel_values"][[1, 3]]
    with torch.no_grad():
        features = tiny_model.get_image_features(pixels)
        with_features = tiny_model(ids, image_features=features).logits
        assert torch.equal(with_features, tiny_model(ids, pixel_values=pixels).logits)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_image_placeholders_are_never_a_target(tiny_model, expected, skip_logits):
    """As if they were ignored in the labels, where a trainer takes the ids as labels."""
    ids, pixels = expected["one_image.input_ids"][None], expected["pixel_values"][:1]
    ids = ids.clone()
    start = int((ids[0] == tiny_model.config.image_start_id).nonzero()[0, 0])
    ids[0, start + 1 : start + 257] = tiny_model.config.image_token_id
    inputs = {"input_ids": ids, "pixel_values": pixels, "skip_logits": skip_logits}
    ignored = ids.masked_fill(ids == tiny_model.config.image_token_id, -100)
    with torch.no_grad():
        right = tiny_model(**inputs, labels=ignored).loss
        assert torch.equal(tiny_model(**inputs, labels=ids).loss, right)
        items = int((ignored[:, 1:] != -100).sum())
        assert torch.equal(tiny_model(**inputs, labels=ids, num_items_in_batch=items).loss, right)


def test_contradictory_arguments_are_named(tiny_model, expected):
    ids, pixels = expected["one_image.input_ids"][None], expected["pixel_values"][:1]
    with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
        tiny_model()
    with pytest.raises(InputError, match="either pixel_values or image_features"):
        tiny_model(ids, pixel_values=pixels, image_features=torch.zeros(1, 256, 256))
    with pytest.raises(InputError, match="images need input_ids"):
        tiny_model(inputs_embeds=torch.zeros(1, 5, 256), pixel_values=pixels)
    with pytest.raises(InputError, match=r"1 whole image span.* 0 image"):
        tiny_model(ids)
    with pytest.raises(InputError, match=r"0 whole image span.* 1 image"):
        tiny_model(ids[:, :100], pixel_values=pixels)


def test_sampled_stray_image_tokens_crash_nothing(tiny_model):
    config = tiny_model.config
    stray = [config.image_start_id, config.image_token_id, 5, config.image_end_id, config.image_token_id] * 60
    with torch.no_grad():
        assert tiny_model(torch.tensor([stray])).logits.isfinite().all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(tiny_folder, expected, dtype, attention):
    model = QwenVLForConditionalGeneration.from_pretrained(tiny_folder, dtype=dtype, attn_implementation=attention)
    model.eval()
    with torch.no_grad():
        logits = model(expected["one_image.input_ids"][None], pixel_values=expected["pixel_values"][:1]).logits[0]
    assert logits.dtype == dtype
    # Logits reach 10 here; the last bit of bfloat16 is 0.03 at 5.
    limit = 0.4 if dtype == torch.bfloat16 else 0.05
    assert (logits[::6].float() - expected["one_image.logits"]).abs().max() < limit


def test_hidden_states_and_attentions(tiny_folder, expected):
    model = QwenVLForConditionalGeneration.from_pretrained(tiny_folder, attn_implementation="eager").eval()
    with torch.no_grad():
        outputs = model(expected["text_only.input_ids"][None], output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    assert torch.allclose(outputs.attentions[0].sum(-1), torch.ones(1, 4, 21))


def test_logits_to_keep(tiny_model, expected):
    ids = expected["text_only.input_ids"][None]
    with torch.no_grad():
        logits = tiny_model(ids).logits
        assert torch.allclose(tiny_model(ids, logits_to_keep=3).logits, logits[:, -3:], atol=1e-6)
        picked = torch.tensor([0, 7])
        assert torch.allclose(tiny_model(ids, logits_to_keep=picked).logits, logits[:, picked], atol=1e-6)
    with pytest.raises(InputError, match="neighbouring positions"):
        tiny_model(ids, labels=ids, logits_to_keep=picked)


def test_embeddings_trained_in_float32_beside_bfloat16_blocks(tiny_folder, expected):
    """As PEFT's modules_to_save keeps them: the stream stays 16-bit, the head gets its own type."""
    model = QwenVLForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model.transformer.wte.float()
    model.lm_head.float()
    ids = expected["text_only.input_ids"][None]
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.float32
    assert model.transformer.h[0].attn.c_attn.weight.grad.dtype == torch.bfloat16


def test_the_embedding_table_does_not_shrink_to_the_tokenizer(tiny_model):
    """PEFT's Auto class asks for as many rows as the tokenizer has tokens; published tables have more."""
    tiny_model.resize_token_embeddings(729)
    assert tiny_model.get_input_embeddings().weight.shape[0] == 768
    with pytest.raises(InputError, match="769"):
        tiny_model.resize_token_embeddings(769)


def test_a_text_only_checkpoint_works_as_text_only(tiny_folder):
    keys = json.loads((tiny_folder / "config.json").read_text())
    keys.pop("visual")
    model = QwenVLForConditionalGeneration(QwenVLConfig.from_dict(keys)).eval()
    assert not any("visual" in name for name, _ in model.named_parameters())
    ids = torch.tensor([[1, 2, 3]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 6)
    with pytest.raises(InputError, match="text-only"):
        model.get_image_features(torch.zeros(1, 3, 112, 112))
    with pytest.raises(InputError, match="text-only"):
        model(ids, image_features=torch.zeros(1, 256, 256))
