"""Assisted generation: a smaller model, or the prompt itself, proposes tokens, and the model checks several at once.

    model.generate(**inputs, assistant_model=smaller)       # speculative decoding, with images too
    model.generate(**inputs, prompt_lookup_num_tokens=10)   # what followed the same words in the prompt

Greedy replies are those of the model alone. For that, the prompt is computed by itself before anything is proposed:
dynamic NTK depends on its length (see `rotary.py`), and the images are in it. Nor is an image token ever proposed,
since image spans that are no images of the prompt have no features.

An assistant reads the images with its own vision side, which may give another number of features: in its prompt each
image has as many positions as it gives.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import AssistedCandidateGenerator, CandidateGenerator, GenerationMixin

from qwenvl.errors import InputError
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.image_span import image_span_starts


class AssistedGeneration(GenerationMixin):
    """The part of generation that proposes tokens, for a model that reads images."""

    config: QwenVLConfig

    def _get_candidate_generator(
        self,
        generation_config: GenerationConfig,
        input_ids: torch.LongTensor,
        inputs_tensor: torch.Tensor,
        logits_processor: LogitsProcessorList,
        model_kwargs: dict[str, Any],
        assistant_model: PreTrainedModel | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> CandidateGenerator:
        """What proposes tokens, for Transformers' `generate`.

        Args:
            input_ids: (1, length), the prompt.
            model_kwargs: with images `image_features` of this model, and the `pixel_values` for the assistant.

        Raises:
            InputError: proposals that this model or the assistant cannot make, or that would change the reply.
        """
        refuse_unassisted(generation_config, model_kwargs)
        has_images = model_kwargs.get("image_features") is not None
        prompt = None
        if assistant_model is not None and (target_tokenizer is None or assistant_tokenizer is None):
            features = None
            if has_images:
                features = features_of_assistant(assistant_model, self.config, model_kwargs.get("pixel_values"))
            prompt = prompt_of_assistant(
                input_ids, model_kwargs.get("attention_mask"), self.config, assistant_model.config
            )
            replaced = ("attention_mask", "position_ids", "pixel_values", "image_features")
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in replaced}
            if features is not None:
                model_kwargs["image_features"] = features
            generation_config = moved_limits(generation_config, prompt.shape[1] - input_ids.shape[1])
        elif has_images and assistant_model is not None:
            raise InputError(
                "an assistant with a tokenizer of its own cannot read images: leave tokenizer and assistant_tokenizer "
                "out, with an assistant of this model's vocabulary, or leave assistant_model out"
            )
        inner = super()._get_candidate_generator(  # type: ignore[misc]  # its self type is for another type checker
            generation_config=generation_config,
            input_ids=input_ids if prompt is None else cast(torch.LongTensor, prompt),
            inputs_tensor=inputs_tensor if prompt is None else prompt,
            logits_processor=logits_processor,
            model_kwargs=model_kwargs,
            assistant_model=assistant_model,
            target_tokenizer=target_tokenizer,
            assistant_tokenizer=assistant_tokenizer,
        )
        return CandidatesAfterPrompt(inner, input_ids.shape[1], prompt, image_tokens(self.config))


class CandidatesAfterPrompt(CandidateGenerator):
    """Proposes nothing for the first new token, which is computed with the prompt, and no image tokens.

    Args:
        inner: makes the proposals.
        prompt_length: tokens of the model's prompt.
        assistant_prompt: (1, length), the same prompt for an assistant; None where `inner` has none of its own.
        refused: tokens that are not proposed, nor what follows them.
    """

    def __init__(
        self,
        inner: CandidateGenerator,
        prompt_length: int,
        assistant_prompt: torch.Tensor | None,
        refused: Sequence[int],
    ):
        self.inner, self.prompt_length, self.assistant_prompt = inner, prompt_length, assistant_prompt
        self.refused = refused

    def get_candidates(  # type: ignore[override]  # the base class says that there are always logits
        self, input_ids: torch.LongTensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens so far (1, length) with those that are proposed, and the assistant's logits (1, proposed,
        vocabulary) if there is one."""
        if input_ids.shape[1] == self.prompt_length:
            return input_ids, None
        given: torch.Tensor = input_ids
        if self.assistant_prompt is not None:
            given = torch.cat([self.assistant_prompt, input_ids[:, self.prompt_length :]], dim=1)
            if isinstance(self.inner, AssistedCandidateGenerator):
                self.inner.assistant_kwargs["attention_mask"] = torch.ones_like(given)
        sequence, logits = self.inner.get_candidates(given, **kwargs)  # type: ignore[arg-type]  # any integers
        proposed = sequence[0, given.shape[1] :].tolist()
        kept = next((place for place, token in enumerate(proposed) if token in self.refused), len(proposed))
        if not kept:
            return input_ids, None
        new = sequence[:, given.shape[1] :][:, :kept].to(input_ids.device)
        return torch.cat([input_ids, new], dim=1), None if logits is None else logits[:, :kept]

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Tell the maker of the proposals how many of the last ones were right."""
        self.inner.update_candidate_strategy(input_ids, scores, num_matches)


def refuse_unassisted(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Check for what Transformers' assisted generation would compute wrongly with this model.

    Raises:
        InputError: there is some of it.
    """
    if getattr(generation_config, "assistant_early_exit", None) is not None:
        raise InputError(
            "assistant_early_exit is not supported: this model always computes all of its layers, so nothing would "
            "be won. Leave it out"
        )
    if model_kwargs.get("inputs_embeds") is not None:
        raise InputError(
            "assisted generation looks at the prompt's tokens, and inputs_embeds have none: give input_ids (and "
            "pixel_values), or leave assistant_model and prompt_lookup_num_tokens out"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise InputError(
            "assisted generation does not go on from a cache: leave past_key_values out, or assistant_model and "
            "prompt_lookup_num_tokens"
        )


def features_of_assistant(
    assistant: PreTrainedModel, config: QwenVLConfig, pixel_values: torch.Tensor | None
) -> torch.Tensor:
    """The images as an assistant reads them: (images, its n_queries, its hidden size).

    Args:
        assistant: the model that proposes tokens.
        config: of the model that it assists.
        pixel_values: (images, 3, S, S).

    Raises:
        InputError: it reads no images, or others; or there are only features of the model that it assists.
    """
    own: Any = assistant.config
    if not isinstance(own, QwenVLConfig) or own.visual is None:
        raise InputError(
            f"the assistant ({type(assistant).__name__}, {own.name_or_path or 'no path'}) reads no images, and the "
            "prompt has some: give a Qwen-VL with its vision side as assistant_model, or prompt_lookup_num_tokens"
        )
    if own.image_start_id != config.image_start_id:
        raise InputError(
            f"the assistant's <img> is token {own.image_start_id} and this model's {config.image_start_id}: they have "
            "different vocabularies. Give an assistant of this model's vocabulary"
        )
    if pixel_values is None:
        raise InputError(
            "the assistant encodes the images itself, and image_features are this model's: give pixel_values instead"
        )
    side, size = own.visual["image_size"], pixel_values.shape[-1]
    if size != side:
        raise InputError(
            f"the assistant reads images of {side} x {side} pixels, and this model's have {size} x {size}: give an "
            "assistant of the same visual.image_size"
        )
    return assistant.get_image_features(pixel_values.to(assistant.device))  # type: ignore[operator]


def prompt_of_assistant(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: QwenVLConfig, own: Any
) -> torch.Tensor:
    """A prompt (1, length) for an assistant: without padding, and each image with as many positions as the assistant
    has for it.

    Args:
        config, own: of the model, and of the assistant.
    """
    real = input_ids if attention_mask is None else input_ids[:, attention_mask[0].bool()]
    if not isinstance(own, QwenVLConfig) or own.n_queries == config.n_queries:
        return real
    ids, pieces, end = real[0].tolist(), [], 0
    for start in image_span_starts(real, config)[0].nonzero()[:, 0].tolist():
        pieces += [*ids[end : start + 1], *[config.image_token_id] * own.n_queries]
        end = start + 1 + config.n_queries
    return real.new_tensor([[*pieces, *ids[end:]]])


def moved_limits(generation_config: GenerationConfig, longer: int) -> GenerationConfig:
    """The same settings for a prompt that is `longer` tokens longer: the limits that count its tokens move."""
    moved = copy.deepcopy(generation_config)
    moved.max_length += longer
    if moved.min_length:
        moved.min_length += longer
    return moved


def image_tokens(config: QwenVLConfig) -> tuple[int, ...]:
    """`<img>`, `</img>` and `<imgpad>`; none for a text-only model."""
    found = (config.image_start_id, config.image_end_id, config.image_token_id)
    return tuple(token for token in found if token is not None)
