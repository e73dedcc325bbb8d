"""What Transformers needs to know about the model, and what it must not do when it loads one: guess, or fetch code."""

import os
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from qwenvl.errors import InputError
from qwenvl.model.config_keys import refuse_attention
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.fresh_weights import draw_weights
from qwenvl.model.language import Attention, Block
from qwenvl.model.whole import refuse_unloaded, require_whole

# Arguments with which `from_pretrained` takes its weights from elsewhere than the files that `require_whole` reads.
OTHER_WEIGHTS = ("state_dict", "gguf_file", "variant", "key_mapping", "subfolder", "cache_dir", "token")


class QwenVLPreTrainedModel(PreTrainedModel):
    """What Transformers needs to know about the model, and the initialisation of new weights."""

    config: QwenVLConfig
    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    # These are lists, not tuples, because of the base class's types.
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "VisionBlock", "Resampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        draw_weights(module, self.config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Self:
        """As the base class, but no tensor is left at random numbers.

        Raises:
            InputError: tensors are missing, or of another shape. A new model with random weights is made from a
                config: `QwenVLForConditionalGeneration(config)`.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if pretrained_model_name_or_path is not None:
            refuse_unloaded(str(pretrained_model_name_or_path), info["missing_keys"], info["mismatched_keys"])
        return loaded if wants_info else model

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False
    ) -> str:
        """Transformers fetches a kernel from the hub for what it does not know; here that is refused.

        Raises:
            InputError: see `config_keys.refuse_attention`.
        """
        refuse_attention(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, is_init_check)

    def set_use_kernels(self, use_kernels: bool, *args: Any, **kwargs: Any) -> None:
        """Raises:
        InputError: `use_kernels` is true: Transformers would fetch kernels from the hub.
        """
        if use_kernels:
            raise InputError(
                "use_kernels fetches code from the hub: use qwenvl.model.kernels.use_kernels(model, 'liger')"
            )
        super().set_use_kernels(use_kernels, *args, **kwargs)


def require_whole_files(path: str | os.PathLike[str] | None, arguments: Mapping[str, Any]) -> None:
    """Check the files that `from_pretrained` with these arguments would load, before it does.

    Where the arguments name other files, what it reports afterwards is checked alone.

    Raises:
        InputError: see `whole.require_whole`.
    """
    if path is not None and not loads_elsewhere(arguments):
        config = arguments.get("config")
        require_whole(os.fspath(path), config if isinstance(config, QwenVLConfig) else None)


def loads_elsewhere(arguments: Mapping[str, Any]) -> bool:
    """Whether `from_pretrained` with these arguments loads other files than those of a folder, or of a hub id's main
    revision."""
    return any(arguments.get(key) for key in OTHER_WEIGHTS) or arguments.get("revision") not in (None, "main")
