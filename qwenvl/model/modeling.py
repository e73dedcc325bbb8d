"""Qwen-VL: embed, place image features, decode, logits, loss, generate."""

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.utils import GenerateOutput
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from qwenvl.checkpoint.record import trained_as
from qwenvl.errors import InputError
from qwenvl.images.image_processor import normalize_pixels
from qwenvl.model.assisted import AssistedGeneration
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.generation import (
    PublishedGenerationConfig,
    images_of_suffix,
    read_published_settings,
    refuse_chunked_prefill,
    repeat_images,
    reply_as_trained,
)
from qwenvl.model.gptq_checkpoint import gptq_arguments
from qwenvl.model.image_span import place_image_features
from qwenvl.model.language import Block, RMSNorm
from qwenvl.model.loss import (
    in_type_of,
    mean_loss,
    next_token_loss,
    supervised_loss,
    supervised_positions,
    without_image_targets,
)
from qwenvl.model.nf4_weights import compute_in
from qwenvl.model.pretrained import QwenVLPreTrainedModel, loads_elsewhere, require_whole_files
from qwenvl.model.quantized_head import head_logits
from qwenvl.model.rotary import Positions, dynamic_ntk_alpha, rotary_positions
from qwenvl.model.sequences import (
    PackedSequences,
    is_packed,
    lengths_of_sequences,
    padded_positions,
    positions_of_sequences,
    real_lengths,
)
from qwenvl.model.varlen_attention import VARLEN
from qwenvl.model.vision import VisionTransformer


class QwenVLModel(QwenVLPreTrainedModel):
    """The decoder with its vision side: ids and pixels in, hidden states out."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if config.visual is not None:
            self.visual = VisionTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value  # type: ignore[assignment]  # Transformers and loading may put another module there

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images in one pass.

        Args:
            pixel_values: (images, 3, S, S), float normalised, or uint8 as decoded.

        Returns:
            (images, n_queries, hidden)

        Raises:
            InputError: a text-only checkpoint, or pixels of another shape.
        """
        self.config.require_visual()
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize_pixels(pixel_values)
        return self.visual(pixel_values)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        sequence_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments and errors: see `QwenVLForConditionalGeneration.forward`.

        Returns:
            `last_hidden_state` (batch, length, hidden) after the final norm, and the cache.
        """
        hidden = self._embed(input_ids, inputs_embeds, pixel_values, image_features)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if sequence_lengths is not None:
            if any(given is not None for given in (position_ids, attention_mask, past_key_values)):
                raise InputError(
                    "sequence_lengths replace position_ids, attention_mask and past_key_values: do not give these too"
                )
            position_ids = positions_of_sequences(sequence_lengths, hidden)
            packed = len(sequence_lengths) > len(hidden)
        else:
            packed = is_packed(position_ids, attention_mask) if past_key_values is None else False
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        elif use_cache and packed:
            raise InputError("packed sequences (several within a row) cannot use a cache")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = padded_positions(attention_mask, past_length, hidden)
        mask = None
        if packed and self.config._attn_implementation == VARLEN:
            lengths = lengths_of_sequences(position_ids) if sequence_lengths is None else sequence_lengths
            kwargs["sequences"] = PackedSequences.of_lengths(lengths, hidden.device)
        else:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        positions = self._positions(position_ids, attention_mask, past_key_values, past_length)
        hidden = nn.functional.dropout(hidden, p=self.config.emb_dropout_prob, training=self.training)
        for block in self.h:
            hidden = block(
                hidden,
                positions=positions,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden), past_key_values=past_key_values)

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
    ) -> torch.Tensor:
        """Token embeddings with image features in place: (batch, length, hidden), in the blocks' dtype."""
        if pixel_values is not None and image_features is not None:
            raise InputError("give either pixel_values or image_features, not both")
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        if input_ids is not None and inputs_embeds is None:
            hidden = self.wte(input_ids)
            if self.config.visual is not None:
                hidden = place_image_features(hidden, input_ids, image_features, self.config)
            elif image_features is not None:
                raise InputError("this is a text-only Qwen checkpoint: it takes no image_features")
        elif inputs_embeds is not None and input_ids is None:
            if image_features is not None:
                raise InputError("images need input_ids, which say where they are; inputs_embeds do not")
            hidden = inputs_embeds
        else:
            raise InputError("give either input_ids or inputs_embeds")
        # An embedding table trained in float32 beside 16-bit blocks must not make all hidden states float32.
        norm = self.ln_f.weight
        if isinstance(norm, DTensor) and norm.dtype.itemsize > hidden.dtype.itemsize:
            return hidden  # a float32 shard, which FSDP2 rounds when it gathers it, as it did the embeddings
        return hidden.to(norm.dtype)

    def _positions(
        self,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        past_length: int,
    ) -> Positions:
        """Rotary table and log-n factors of this forward; the two long-context extensions act in eval mode only.

        Dynamic NTK depends on the length of each row's prompt (or packed sequence), without padding. Decoding steps
        keep the prompt's value, which is stored on the cache.
        """
        config, ntk_alpha, log_n_from = self.config, None, None
        if not self.training:
            length = position_ids.shape[1]
            if config.use_dynamic_ntk:
                if past_length:
                    ntk_alpha = getattr(past_key_values, "ntk_alpha", None)
                elif length > config.seq_length:
                    ntk_alpha = dynamic_ntk_alpha(real_lengths(position_ids, attention_mask), config.seq_length)
                if past_key_values is not None and not past_length:
                    # The cache carries it to the decoding steps.
                    past_key_values.ntk_alpha = (  # type: ignore[attr-defined]  # an attribute of ours
                        None if ntk_alpha is None else ntk_alpha.amax(1, keepdim=True)
                    )
            if config.use_logn_attn and past_length + length > config.seq_length:
                log_n_from = config.seq_length
        return rotary_positions(
            position_ids,
            head_dim=config.kv_channels,
            base=config.rotary_emb_base,
            ntk_alpha=ntk_alpha,
            log_n_from=log_n_from,
        )


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, AssistedGeneration, GenerationMixin):
    """Qwen-VL with its language-model head."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.transformer = QwenVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # the class name matches none of Transformers' loss mappings
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Self:
        """As the base class, and adapt a published generation config (see `read_published_settings`). Replies end
        where the record of the model's training (`qwenvl.json`) says.

        Checkpoints packed by GPTQ are read as the 16-bit weights that they stand for.

        Raises:
            MissingFileError: no checkpoint, or no weights.
            InputError: a checkpoint that is not whole or that must not be followed: see `whole.require_whole`; packed
                weights that cannot be read, or not with these arguments.
        """
        path = pretrained_model_name_or_path
        require_whole_files(path, kwargs)
        packed = gptq_arguments(path, kwargs)
        place, arguments = (path, kwargs) if packed is None else (None, packed)
        loaded = super().from_pretrained(place, *args, **arguments)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        if packed is not None:
            model.name_or_path = model.config.name_or_path = str(path)
        settings = read_published_settings(model.generation_config, model.config)
        if path is not None and not loads_elsewhere(kwargs):
            reply_as_trained(settings, model.config, trained_as(os.fspath(path)))
        model.generation_config = PublishedGenerationConfig.of(settings)
        if getattr(model, "is_loaded_in_4bit", False):  # set by Transformers
            compute_in(model, model.dtype)
        return loaded

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.set_input_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Return the embeddings unchanged. Published tables have spare rows, and PEFT's Auto class asks for as many
        rows as the tokenizer has tokens.

        Raises:
            InputError: more rows than there are. Qwen's special tokens follow directly after the vocabulary, so there
                are no ids for new tokens.
        """
        if new_num_tokens is not None and new_num_tokens > self.config.vocab_size:
            raise InputError(
                f"cannot resize the embeddings to {new_num_tokens} tokens: the table has {self.config.vocab_size} "
                "rows, and the tokenizer has no free ids. Use the 205 spare tokens <|extra_0|> .. <|extra_204|>"
            )
        return self.get_input_embeddings()

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `QwenVLModel.get_image_features`: (images, 3, S, S) -> (images, n_queries, hidden)."""
        return self.transformer.get_image_features(pixel_values)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        sequence_lengths: Sequence[int] | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict the next token at every position.

        Args:
            input_ids: (batch, length). An image is `<img>`, n_queries x `<imgpad>`, `</img>`.
            attention_mask: (batch, past + length), 1 for real tokens, padding on either side; or a 4-D mask.
            position_ids: (batch, length), 0-based. Positions that restart within a row mark packed sequences, which
                then do not see each other (give no attention_mask with them).
            pixel_values: (images of the whole batch in reading order, 3, S, S), float normalised or uint8.
            labels: (batch, length), ids, -100 where not trained; shifted inside. Image placeholders are not trained
                either, as nothing generates them (see `loss.without_image_targets`).
            inputs_embeds: (batch, length, hidden) instead of ids, images already placed.
            image_features: (images, n_queries, hidden) instead of pixel_values, from `get_image_features`.
            logits_to_keep: compute logits for the last n positions only (0: all), or for an index tensor of positions:
                (kept positions,) of all rows, or (batch, kept positions) of each row.
            num_items_in_batch: supervised tokens of the whole step; see `loss.mean_loss`.
            sequence_lengths: tokens of each packed sequence, in order, on the host: instead of position_ids, which
                would have to be searched on the device.
            skip_logits: for training, with labels: compute only the loss, with a few rows of logits at a time. It is
                an argument of forward so that it passes through wrappers of the model (DDP, FSDP, PEFT).

        Returns:
            `logits` (batch, kept positions, vocabulary) in the model's dtype, None with skip_logits; `loss` if labels
            were given; `past_key_values` if a cache is used. A tuple with `return_dict=False`.

        Raises:
            InputError: images and image spans differ in number; contradictory arguments.
        """
        return_dict = kwargs.pop("return_dict", None)
        supervised = None
        if labels is not None:
            labels = without_image_targets(labels, self.config.image_token_id)
        if skip_logits:
            if labels is None or not isinstance(logits_to_keep, int) or logits_to_keep:
                raise InputError("skip_logits returns only the loss: it needs labels, and no logits_to_keep")
            supervised = supervised_positions(labels)  # synchronises with the device, which has little to do yet
        elif labels is not None and not isinstance(logits_to_keep, int):
            raise InputError("labels need logits of neighbouring positions: give logits_to_keep as a number")
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            pixel_values=pixel_values,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            use_cache=use_cache,
            sequence_lengths=sequence_lengths,
            **kwargs,
        )
        hidden, logits, loss = outputs.last_hidden_state, None, None
        if supervised is not None:
            rows, targets = supervised
            hidden = hidden.flatten(0, 1)[rows.to(hidden.device)]
            total = supervised_loss(hidden, self.lm_head, targets.to(hidden.device))
            loss = mean_loss(total, len(rows), num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            if isinstance(kept, torch.Tensor) and kept.ndim == 2:
                hidden = hidden.take_along_dim(kept[..., None].to(hidden.device), dim=1)
                kept = slice(None)
            logits = head_logits(self.lm_head, in_type_of(self.lm_head, hidden[:, kept]))
            if labels is not None:
                loss = next_token_loss(logits, labels[:, kept], num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | torch.LongTensor:
        """As Transformers' `generate`, with images: each is encoded once, however many beams or returned sequences.

        An `assistant_model` encodes the images too, itself: see `qwenvl.model.assisted`.

        Raises:
            InputError: `prefill_chunk_size` is set (see `generation.refuse_chunked_prefill`), or assisted generation
                that is not possible.
        """
        refuse_chunked_prefill(
            kwargs.get("prefill_chunk_size"),
            getattr(generation_config or self.generation_config, "prefill_chunk_size", None),
        )
        if pixel_values is not None:
            if image_features is not None:
                raise InputError("give either pixel_values or image_features, not both")
            image_features = self.get_image_features(pixel_values)
            if kwargs.get("assistant_model") is not None:
                kwargs["pixel_values"] = pixel_values
        if image_features is not None:
            kwargs["image_features"] = image_features
        return super().generate(  # type: ignore[misc]  # GenerationMixin's self type is for another type checker
            inputs, generation_config, *args, **kwargs
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        features = model_kwargs.pop("image_features", None)
        expanded_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]  # as in generate
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if features is not None:
            assert input_ids is not None, (
                "a decoder-only model generates from input_ids, empty ones with inputs_embeds"
            )
            model_kwargs["image_features"] = (
                features if expand_size == 1 else repeat_images(features, input_ids, expand_size, self.config)
            )
        return expanded_ids, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if image_features is not None:
            kwargs.pop("pixel_values", None)  # an assistant's
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]  # as in generate
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # The prompt of an assistant is no first iteration to Transformers, but is longer than a step of decoding.
        is_prompt = is_first_iteration or next_sequence_length not in (None, 1)
        if image_features is not None and (is_prompt or not kwargs.get("use_cache", True)):
            if next_sequence_length is not None:
                image_features = images_of_suffix(image_features, input_ids, next_sequence_length, self.config)
            inputs["image_features"] = image_features
        return inputs
