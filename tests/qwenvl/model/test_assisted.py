"""Assisted generation: proposals change the number of steps, never the reply."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from transformers.generation import PromptLookupCandidateGenerator

from qwenvl import InputError, QwenVLConfig, QwenVLForConditionalGeneration
from qwenvl.model.assisted import CandidatesAfterPrompt, image_tokens

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
SMALLER = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}


def inputs_of(processor, *images, text="What is it?", **layout):
    parts = [{"type": "image", "image": str(image)} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **layout
    )


def with_config(model, visual=None, **changes) -> QwenVLForConditionalGeneration:
    """A model of random weights whose configuration differs."""
    visual = None if visual is None else {**model.config.visual, **visual}
    torch.manual_seed(1)
    return QwenVLForConditionalGeneration(
        QwenVLConfig.from_dict({**model.config.to_dict(), "visual": visual, **changes})
    ).eval()


@dataclass
class Steps:
    """What a model computes: tokens of each forward, and the features that its images become."""

    tokens: list[int] = field(default_factory=list)
    features: list[tuple[int, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, model) -> "Steps":
        steps = cls()
        model.transformer.register_forward_pre_hook(
            lambda _module, _args, given: steps.tokens.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        model.transformer.visual.register_forward_hook(
            lambda _module, _args, output: steps.features.append(tuple(output.shape))
        )
        return steps


def new_tokens(model, inputs, **how):
    return model.generate(**inputs, **{**GREEDY, **how})[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("images", [1, 2])
def test_an_assistant_that_is_always_right_saves_steps(tiny_model, tiny_processor, tiny_images, images):
    inputs, assistant = inputs_of(tiny_processor, *tiny_images[:images]), copy.deepcopy(tiny_model)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    alone = new_tokens(tiny_model, inputs)
    steps, assisting = Steps.of(tiny_model), Steps.of(assistant)
    assert new_tokens(tiny_model, inputs, assistant_model=assistant) == alone
    assert steps.tokens[0] == inputs["input_ids"].shape[1] and len(steps.tokens) <= 4
    assert steps.features == assisting.features == [(images, 256, 256)]


@pytest.mark.parametrize("padded", [False, True])
def test_an_assistant_reads_the_images_in_its_own_way(tiny_model, tiny_processor, tiny_images, padded):
    layout = {"padding": "max_length", "max_length": 620, "padding_side": "left"} if padded else {}
    inputs = inputs_of(tiny_processor, *tiny_images[:2], processor_kwargs=layout)
    assistant = with_config(tiny_model, visual={"n_queries": 64, "output_dim": 128}, **SMALLER)
    alone = new_tokens(tiny_model, inputs)
    steps, assisting = Steps.of(tiny_model), Steps.of(assistant)
    assert new_tokens(tiny_model, inputs, assistant_model=assistant) == alone
    assert steps.features == [(2, 256, 256)] and assisting.features == [(2, 64, 128)]
    real = int(inputs["attention_mask"].sum())
    assert assisting.tokens[0] == real + 1 - 2 * (256 - 64), "its prompt and the first token of the reply"


def test_a_text_needs_no_assistant_with_eyes(tiny_model, tiny_processor):
    inputs = inputs_of(tiny_processor)
    text_only = with_config(tiny_model, **SMALLER)
    assert new_tokens(tiny_model, inputs, assistant_model=text_only) == new_tokens(tiny_model, inputs)


def test_sampling_with_an_assistant_is_seeded(tiny_model, tiny_processor, tiny_images):
    inputs = inputs_of(tiny_processor, tiny_images[0])
    assistant = with_config(tiny_model, visual={"output_dim": 128}, **SMALLER)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(new_tokens(tiny_model, inputs, assistant_model=assistant, do_sample=True, temperature=5.0))
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("with_assistant", [False, True])
def test_proposals_do_not_stretch_the_prompt(tiny_model, with_assistant):
    """Dynamic NTK goes by the prompt's length: with its first proposals it would be longer than seq_length (700)."""
    torch.manual_seed(0)
    words = torch.randint(0, 500, (1, 139)).repeat(1, 6)[:, :699]
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    how = {"assistant_model": copy.deepcopy(tiny_model)} if with_assistant else {"prompt_lookup_num_tokens": 8}
    alone = tiny_model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assisted = tiny_model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True, **how)
    assert torch.equal(assisted.sequences, alone.sequences)
    for one, other in zip(assisted.logits, alone.logits, strict=True):
        assert (one - other).abs().max() < 1e-4


def test_no_image_is_proposed(tiny_model):
    config = copy.deepcopy(tiny_model.config)
    start, end, pad = image_tokens(config)
    prompt = torch.tensor([[5, 6, 7, start, pad, pad, end, 8, 5, 6]])
    inner = PromptLookupCandidateGenerator(num_output_tokens=6, max_matching_ngram_size=2, max_length=100)
    proposed, _ = inner.get_candidates(prompt)
    assert proposed[0, 10:].tolist() == [7, start, pad, pad, end, 8]
    candidates = CandidatesAfterPrompt(inner, 9, None, (start, end, pad))
    assert candidates.get_candidates(prompt)[0][0, 10:].tolist() == [7]
    follows = torch.tensor([[6, 7, start, pad, pad, end, 8, 6, 7]])
    assert candidates.get_candidates(torch.cat([prompt, follows], 1))[0].shape[1] == 19, "nothing is left of it"
    assert candidates.get_candidates(prompt[:, :9])[0].shape[1] == 9, "the prompt is computed by itself"


@pytest.mark.parametrize(
    ("visual", "said"),
    [
        (None, "reads no images"),
        ({"image_size": 140}, "140 x 140 pixels"),
        ({"image_start_id": 700}, "different vocabularies"),
    ],
)
def test_an_assistant_that_cannot_read_the_images_is_refused(tiny_model, tiny_processor, tiny_images, visual, said):
    assistant = with_config(tiny_model, visual, num_hidden_layers=1)
    with pytest.raises(InputError, match=said):
        new_tokens(tiny_model, inputs_of(tiny_processor, tiny_images[0]), assistant_model=assistant)


def test_features_are_no_images_for_an_assistant(tiny_model, tiny_processor, tiny_images):
    inputs = inputs_of(tiny_processor, tiny_images[0])
    inputs["image_features"] = tiny_model.get_image_features(inputs.pop("pixel_values"))
    with pytest.raises(InputError, match="give pixel_values instead"):
        new_tokens(tiny_model, inputs, assistant_model=copy.deepcopy(tiny_model))


def test_what_transformers_would_compute_wrongly_is_refused(tiny_model, tiny_processor):
    inputs = inputs_of(tiny_processor)
    cache = tiny_model(**inputs, use_cache=True).past_key_values
    longer = {name: torch.cat([column, torch.ones_like(column)], 1) for name, column in inputs.items()}
    with pytest.raises(InputError, match="does not go on from a cache"):
        new_tokens(tiny_model, longer, past_key_values=cache, prompt_lookup_num_tokens=3)
    with pytest.raises(InputError, match="assistant_early_exit"):
        new_tokens(tiny_model, inputs, assistant_early_exit=1)
    embeddings = tiny_model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(InputError, match="inputs_embeds have none"):
        tiny_model.generate(inputs_embeds=embeddings, **GREEDY, prompt_lookup_num_tokens=3)
