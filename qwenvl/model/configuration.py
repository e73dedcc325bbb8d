"""The configuration of a Qwen-VL (or text-only Qwen) checkpoint, in the published `config.json` layout."""

import os
from dataclasses import field
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from qwenvl.checkpoint.settings import (
    LARGEST_SIDE,
    check_keys,
    examine_settings,
    is_number,
    is_whole,
    shortened,
)
from qwenvl.errors import InputError, MissingFileError
from qwenvl.model.config_keys import KEYS, checked_keys

# The vision side of the published 9.66 B checkpoints.
PUBLISHED_VISUAL = {
    "heads": 16,
    "image_size": 448,
    "image_start_id": 151857,
    "layers": 48,
    "mlp_ratio": 4.9231,
    "output_dim": 4096,
    "patch_size": 14,
    "width": 1664,
}

# `<|endoftext|>` is the first special token after the BPE ranks, `<img>` the 215th: see `qwenvl/text/vocabulary.py`.
IMAGE_START_AFTER_END_OF_TEXT = 214

RESAMPLER_HEAD_DIM = 128

# What must be a positive number, at the top and in `visual`.
LANGUAGE_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels", "intermediate_size"),
    *("max_position_embeddings", "seq_length"),
)
# No model is a hundredth of this, and building one would take hours or all memory.
MOST_LAYERS, LARGEST_SIZE = 1000, 1 << 24
VISUAL_NUMBERS = (*PUBLISHED_VISUAL, "n_queries")
NUMBERS = {
    key: KEYS[key]
    for key in ("layer_norm_epsilon", "rotary_emb_base", "initializer_range", "attn_dropout_prob", "emb_dropout_prob")
}


class QwenVLConfig(PreTrainedConfig):
    """Sizes and switches of the model. The defaults are those of the published Qwen-VL.

    Keys without a meaning here (`onnx_safe`, `use_flash_attn`, `fp16`, ...) are kept and written back on save.

    Args:
        vocab_size: rows of the embedding and of the head (more than the tokenizer has tokens).
        hidden_size: width of the language model.
        kv_channels: width of one attention head.
        intermediate_size: twice the inner width of the MLP, as published.
        seq_length: tokens of the training context; the two extensions below act beyond it, in eval mode only.
        use_dynamic_ntk: increase the rotary base for sequences longer than `seq_length`.
        use_logn_attn: scale queries at positions beyond `seq_length` by `log(position, seq_length)`.
        visual: the vision side (`PUBLISHED_VISUAL` lists its keys; `n_queries` may be added, 256 if absent), or
            None for a text-only Qwen checkpoint.

    Raises:
        InputError: sizes that contradict each other, or a switch that no published checkpoint uses.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"head_dim": "kv_channels"}
    tokenizer_class: ClassVar[str] = "QwenVLTokenizer"
    # TRL reads it of every model that is given by its path. Of published files it names their code, and is kept.
    auto_map: ClassVar[dict[str, str]] = {}
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "wte": "free_full_weight",
        "h.*": "free_full_weight",
        "ln_f": "keep_full_weight",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    max_position_embeddings: int = 8192
    seq_length: int = 2048
    rotary_emb_base: float | int = 10000
    rotary_pct: float | int = 1.0
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    attn_dropout_prob: float | int = 0.0
    emb_dropout_prob: float | int = 0.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_cache: bool = True
    no_bias: bool = True
    tie_word_embeddings: bool = False
    visual: dict[str, Any] | None = field(default_factory=lambda: dict(PUBLISHED_VISUAL))

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for key in LANGUAGE_SIZES:
            value = getattr(self, key)
            if not (is_whole(value) and value > 0):
                raise InputError(f"config: {key} must be a positive whole number, not {shortened(value)}")
            _refuse_absurd(key, value)
        check_keys(vars(self), NUMBERS, "config")
        if self.tie_word_embeddings:
            raise InputError("config: tie_word_embeddings must be false: Qwen checkpoints have a head of their own")
        if not self.no_bias:
            raise InputError("config: no_bias must be true: only c_attn has a bias in Qwen checkpoints")
        if self.rotary_pct != 1:
            raise InputError(f"config: rotary_pct is {self.rotary_pct}, but Qwen rotates the whole head (1.0)")
        if self.kv_channels % 2 or self.intermediate_size % 2:
            raise InputError(
                f"config: kv_channels ({self.kv_channels}) and intermediate_size ({self.intermediate_size}) must be "
                "even"
            )
        if self.visual is not None:
            self._check_visual(self.visual)

    def _check_visual(self, visual: dict[str, Any]) -> None:
        missing = [key for key in PUBLISHED_VISUAL if key not in visual]
        if missing:
            raise InputError(f"config: visual lacks {', '.join(missing)}")
        for key, value in visual.items():
            is_right = is_number if key == "mlp_ratio" else is_whole
            if key in VISUAL_NUMBERS and not (is_right(value) and value > 0):
                number = "number" if key == "mlp_ratio" else "whole number"
                raise InputError(f"config: visual.{key} must be a positive {number}, not {shortened(value)}")
            if key in VISUAL_NUMBERS:
                _refuse_absurd(f"visual.{key}", value)
        if visual["image_size"] > LARGEST_SIDE:
            raise InputError(f"config: visual.image_size ({visual['image_size']}) must be {LARGEST_SIDE:,} at most")
        if visual["output_dim"] != self.hidden_size:
            raise InputError(
                f"config: visual.output_dim ({visual['output_dim']}) must equal hidden_size ({self.hidden_size})"
            )
        if visual["output_dim"] < RESAMPLER_HEAD_DIM or visual["output_dim"] % self.resampler_heads:
            raise InputError(
                f"config: visual.output_dim ({visual['output_dim']}) must be {RESAMPLER_HEAD_DIM} or more, and divide "
                f"evenly into one head for each whole {RESAMPLER_HEAD_DIM}"
            )
        if visual["width"] % visual["heads"]:
            raise InputError(f"config: visual.width ({visual['width']}) must divide into {visual['heads']} heads")
        if visual["image_size"] % visual["patch_size"]:
            raise InputError(
                f"config: visual.image_size ({visual['image_size']}) must be a multiple of visual.patch_size "
                f"({visual['patch_size']})"
            )
        if isqrt(self.n_queries) ** 2 != self.n_queries:
            raise InputError(f"config: visual.n_queries ({self.n_queries}) must be a square number")
        image_token_id = visual["image_start_id"] + 2
        if image_token_id >= self.vocab_size:
            raise InputError(
                f"config: <imgpad> would be id {image_token_id} (visual.image_start_id + 2), but vocab_size is "
                f"{self.vocab_size}"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Self:
        """As the base class.

        Raises:
            MissingFileError: no config.json at this path or hub id.
            InputError: config.json cannot be read, or is not a valid configuration.
        """
        path = pretrained_model_name_or_path
        if Path(path).is_dir():
            examine_settings(Path(path, kwargs.get("subfolder") or ""))
        try:
            return super().from_pretrained(path, *args, **kwargs)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except OSError as error:
            kind = InputError if (Path(path) / CONFIG_NAME).is_file() else MissingFileError
            raise kind(f"{path}: config.json cannot be read: {str(error).splitlines()[0]}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As the base class, but a file without a `visual` key is a text-only checkpoint, not the published default.

        Raises:
            InputError: not a valid configuration.
        """
        if not isinstance(config_dict, dict):
            raise InputError(f"config: must be a mapping of names to values, not {type(config_dict).__name__}")
        dtype = config_dict.get("dtype") or config_dict.get("torch_dtype")
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(
                f"config: dtype must name a floating-point dtype of PyTorch, such as float32, not {shortened(dtype)}"
            )
        visual = config_dict.get("visual")
        if visual is not None and not isinstance(visual, dict):
            raise InputError(f"config: visual must be an object with the sizes of the vision side, not {visual!r}")
        config_dict = checked_keys(config_dict, cls)
        try:
            return super().from_dict({"visual": None, **config_dict}, **kwargs)
        except StrictDataclassError as error:
            raise InputError(f"config: {' '.join(str(error).split())}") from error

    def require_visual(self) -> dict[str, Any]:
        """`visual` of a checkpoint with images.

        Raises:
            InputError: a text-only checkpoint.
        """
        if self.visual is None:
            raise InputError("this is a text-only Qwen checkpoint (its config has no `visual`): it takes no images")
        return self.visual

    @property
    def n_queries(self) -> int:
        """Tokens of one image between `<img>` and `</img>`; 0 for a text-only checkpoint."""
        return self.visual.get("n_queries", 256) if self.visual else 0

    @property
    def resampler_heads(self) -> int:
        """Attention heads of the resampler: one per 128 channels, rounded down, as in the published code."""
        return self.require_visual()["output_dim"] // RESAMPLER_HEAD_DIM

    @property
    def image_start_id(self) -> int | None:
        """Id of `<img>`."""
        return self.visual["image_start_id"] if self.visual else None

    @property
    def image_end_id(self) -> int | None:
        """Id of `</img>`."""
        return self.visual["image_start_id"] + 1 if self.visual else None

    @property
    def image_token_id(self) -> int | None:
        """Id of `<imgpad>`, the placeholder of an image feature."""
        return self.visual["image_start_id"] + 2 if self.visual else None


def _refuse_absurd(key: str, value: float) -> None:
    """Raises:
    InputError: a size that no model can have.
    """
    largest = MOST_LAYERS if key.endswith("layers") else LARGEST_SIZE
    if value > largest:
        raise InputError(f"config: {key} is {shortened(value)}, which is more than any model has ({largest:,})")
