"""What a `config.json` may say beyond the model's sizes: nothing that makes Transformers fetch, run or drop anything.

Transformers sets every key of the file as an attribute of the config, and reads many of them: by
`_attn_implementation: kernels-community/...` it fetches and imports code, by `sliding_window` it forgets tokens.
"""

from dataclasses import fields
from typing import Any

from qwenvl.checkpoint.settings import (
    CONFIG_FILES,
    COUNT,
    FLAG,
    NOTHING,
    OBJECT,
    TEXT,
    Rule,
    check_keys,
    is_number,
    is_whole,
    only,
    refuse_names_of,
)
from qwenvl.errors import InputError

ATTENTIONS = ("eager", "sdpa", "varlen", "flash_attention_2", "flex_attention")
"""What attention may be computed with: all are part of PyTorch, of this package, or of an installed package."""

MOST_LABELS = 1000

_SHARE: Rule = (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1")

KEYS: dict[str, Rule] = {
    **dict.fromkeys(("_attn_implementation", "attn_implementation"), only(*ATTENTIONS)),
    **dict.fromkeys(("_experts_implementation", "experts_implementation"), NOTHING),
    "layer_norm_epsilon": (lambda value: is_number(value) and 0 < value < 1, "a positive number below 1"),
    "rotary_emb_base": (lambda value: is_number(value) and value > 1, "a number above 1"),
    "initializer_range": (lambda value: is_number(value) and value >= 0, "a number from 0 on"),
    **dict.fromkeys(("attn_dropout_prob", "emb_dropout_prob"), _SHARE),
    **dict.fromkeys(("use_dynamic_ntk", "use_logn_attn", "use_cache", "no_bias", "tie_word_embeddings"), FLAG),
    "architectures": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
    "auto_map": OBJECT,
    "model_type": only("qwen"),
    **dict.fromkeys(("tokenizer_class", "tokenizer_type", "transformers_version"), TEXT),
    "num_labels": (lambda value: is_whole(value) and 0 <= value <= MOST_LABELS, f"at most {MOST_LABELS}"),
    "id2label": (
        lambda value: (
            isinstance(value, dict) and len(value) <= MOST_LABELS and all(str(key).isdecimal() for key in value)
        ),
        f"an object of at most {MOST_LABELS}, by number",
    ),
    "label2id": OBJECT,
    "problem_type": only("regression", "single_label_classification", "multi_label_classification"),
    "quantization_config": OBJECT,
    **dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), COUNT),
    **CONFIG_FILES,
    # What Transformers would build, patch or distribute.
    **dict.fromkeys(("fusion_config", "distributed_config", "compile_config", "compression_config"), NOTHING),
    **dict.fromkeys(("per_layer_config", "sub_configs_defaults", "text_config", "vision_config"), NOTHING),
    **dict.fromkeys(("backbone_config", "attribute_map", "rope_scaling", "rope_parameters"), NOTHING),
    # What Transformers' caches and masks would compute in another way, silently.
    **dict.fromkeys(("sliding_window", "layer_types", "attention_chunk_size", "kv_sharing_modes"), NOTHING),
    **dict.fromkeys(("mlp_layer_types", "mtp_layer_types", "num_mtp_layers", "mtp_per_layer_config"), NOTHING),
    "tie_last_hidden_states": NOTHING,
    **dict.fromkeys(("is_causal", "return_dict"), only(True)),
    **dict.fromkeys(("is_encoder_decoder", "output_hidden_states", "output_attentions"), only(False)),
    "chunk_size_feed_forward": only(0),
}

# Attributes of the class that a file may name all the same: Transformers writes them, or they say what they are.
NAMED = {
    *("model_type", "tokenizer_class", "num_labels", "name_or_path", "torch_dtype", "output_attentions", "auto_map"),
    *("rope_scaling", "per_layer_config", "attribute_map", "sub_configs_defaults"),  # null
}


def checked_keys(content: dict[str, Any], kind: type) -> dict[str, Any]:
    """The keys of a `config.json` that are set on a config.

    Which attention computes is not a property of a checkpoint: where a file names one that is known, it is left out,
    as are the notes that Transformers writes for itself (`_name_or_path`, `_commit_hash`).

    Args:
        kind: the config's class, none of whose methods and properties a key may replace.

    Raises:
        InputError: a key that has no place in a checkpoint of this kind, or a value that it must not have.
    """
    check_keys(content, KEYS, "config")
    ours = {key: value for key, value in content.items() if not key.startswith("_") and key != "attn_implementation"}
    refuse_names_of(kind, ours.keys() - {field.name for field in fields(kind)} - NAMED, "config")
    for key in ("experts_implementation", "name_or_path"):
        ours.pop(key, None)
    return ours


def refuse_attention(name: Any) -> None:
    """Check an implementation of attention that a user's program asks for.

    Raises:
        InputError: it is unknown, or flash_attention_2 without the package: Transformers would then fetch a kernel
            from the hub and import it.
    """
    from transformers.utils import is_flash_attn_2_available

    if name is not None and name not in ATTENTIONS:
        raise InputError(f"attention must be computed by one of {', '.join(ATTENTIONS)}, not {name!r}")
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise InputError("flash_attention_2 needs an NVIDIA GPU and the package flash-attn: install it, or use sdpa")
