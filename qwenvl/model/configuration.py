"""The configuration of a Qwen-VL (or text-only Qwen) checkpoint, in the published `config.json` layout."""

from dataclasses import field
from math import isqrt
from typing import Any, ClassVar

from transformers import PreTrainedConfig

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

# `<img>` is the 215th special token after the BPE ranks, `<|endoftext|>` the first: see `tokenizer.py`.
IMAGE_START_AFTER_END_OF_TEXT = 214

RESAMPLER_HEAD_DIM = 128


class QwenVLConfig(PreTrainedConfig):
    """Sizes and switches of the model. The defaults are those of the published Qwen-VL.

    Keys that mean nothing here (`onnx_safe`, `use_flash_attn`, `fp16`, ...) are kept and written back on save.

    Args:
        vocab_size: rows of the embedding and of the head (more than the tokenizer has tokens).
        hidden_size: width of the language model.
        kv_channels: width of one attention head.
        intermediate_size: twice the inner width of the MLP, as published.
        seq_length: tokens of the training context; the two extensions below act beyond it, in eval mode only.
        use_dynamic_ntk: stretch the rotary base for sequences longer than `seq_length`.
        use_logn_attn: scale queries at positions beyond `seq_length` by `log(position, seq_length)`.
        visual: the vision side (`PUBLISHED_VISUAL` lists its keys; `n_queries` may be added, 256 if absent), or
            None for a text-only Qwen checkpoint.

    Raises:
        ValueError: sizes that contradict each other, or a switch no published checkpoint uses.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"head_dim": "kv_channels"}
    tokenizer_class: ClassVar[str] = "QwenVLTokenizer"
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

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.tie_word_embeddings:
            raise ValueError("config: tie_word_embeddings must be false: Qwen checkpoints have a head of their own")
        if not self.no_bias:
            raise ValueError("config: no_bias must be true: only c_attn has a bias in Qwen checkpoints")
        if self.rotary_pct != 1:
            raise ValueError(f"config: rotary_pct is {self.rotary_pct}, but Qwen rotates the whole head (1.0)")
        if self.kv_channels % 2 or self.intermediate_size % 2:
            raise ValueError(
                f"config: kv_channels ({self.kv_channels}) and intermediate_size ({self.intermediate_size}) must be "
                "even"
            )
        if self.visual is not None:
            self._check_visual(self.visual)

    def _check_visual(self, visual: dict[str, Any]):
        missing = [key for key in PUBLISHED_VISUAL if key not in visual]
        if missing:
            raise ValueError(f"config: visual lacks {', '.join(missing)}")
        if visual["output_dim"] != self.hidden_size:
            raise ValueError(
                f"config: visual.output_dim ({visual['output_dim']}) must equal hidden_size ({self.hidden_size})"
            )
        if visual["output_dim"] < RESAMPLER_HEAD_DIM or visual["output_dim"] % self.resampler_heads:
            raise ValueError(
                f"config: visual.output_dim ({visual['output_dim']}) must be {RESAMPLER_HEAD_DIM} or more, and divide "
                f"into one head for each whole {RESAMPLER_HEAD_DIM}"
            )
        if visual["width"] % visual["heads"]:
            raise ValueError(f"config: visual.width ({visual['width']}) must divide into {visual['heads']} heads")
        if visual["image_size"] % visual["patch_size"]:
            raise ValueError(
                f"config: visual.image_size ({visual['image_size']}) must be a multiple of visual.patch_size "
                f"({visual['patch_size']})"
            )
        if isqrt(self.n_queries) ** 2 != self.n_queries:
            raise ValueError(f"config: visual.n_queries ({self.n_queries}) must be a square number")
        if self.image_token_id >= self.vocab_size:
            raise ValueError(
                f"config: <imgpad> would be id {self.image_token_id} (visual.image_start_id + 2), but vocab_size is "
                f"{self.vocab_size}"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As the base class; a file without a `visual` key is a text-only checkpoint, not the published default."""
        return super().from_dict({"visual": None, **config_dict}, **kwargs)

    @property
    def n_queries(self) -> int:
        """Positions one image takes between `<img>` and `</img>`."""
        return self.visual.get("n_queries", 256) if self.visual else 0

    @property
    def resampler_heads(self) -> int:
        """Attention heads of the resampler: the published code takes one for each whole 128 channels."""
        return self.visual["output_dim"] // RESAMPLER_HEAD_DIM

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
        """Id of `<imgpad>`, which holds an image's positions."""
        return self.visual["image_start_id"] + 2 if self.visual else None
