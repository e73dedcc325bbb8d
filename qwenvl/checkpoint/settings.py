"""The settings beside a checkpoint's weights: read, and refused where they are damaged or reach out of their folder.

Transformers takes these files at their word: a key may choose a class to import, a repository to fetch kernels from,
another file to read, or set any attribute of an object. What each key may be is said here by rule, before Transformers
sees the file; what `config.json` may hold is in `qwenvl.model.config_keys`.

| file | keys that could fetch, run or read something else | here |
|---|---|---|
| config.json | `_attn_implementation`, `attn_implementation`: kernels of the hub | a known name has no effect |
| config.json | `transformers_weights`, `configuration_files`: other files | refused |
| config.json | `fusion_config`, `distributed_config`, `per_layer_config`, other quantisations | refused |
| any | `auto_map`, `custom_generate/`: code in the folder | never run: the classes are this package's |
| generation_config.json | compilation, other caches, watermarks, assistant models | refused |
| tokenizer_config.json | `init_inputs`, `vocab_file`: other files | refused; without effect |
| any | names of the object's own methods and attributes | refused |
| chat templates | Jinja | not rendered: `qwenvl.text.chat` renders |
"""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizer

from qwenvl.checkpoint.json_files import read_json, read_text
from qwenvl.checkpoint.own_files import refuse_foreign_file
from qwenvl.errors import InputError

Rule = tuple[Callable[[Any], bool], str]
"""What a value must be, as a test and in words."""

LARGEST_ID = 1 << 31
LARGEST_SIDE = 8192
"""Pixels. Images are resized to squares of this size at most: larger ones are an error in a file, not a model."""


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return is_whole(value) and 0 <= value < LARGEST_ID


def _is_list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_one, value))


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_side(value: Any) -> bool:
    sides = list(value.values()) if isinstance(value, dict) else [value]
    return all(is_whole(side) and 0 < side <= LARGEST_SIDE for side in sides)


def only(*allowed: Any) -> Rule:
    """One of these values, and nothing else."""
    words = [str(value).lower() if isinstance(value, bool) else str(value) for value in allowed]

    def is_allowed(value: Any) -> bool:
        # True is 1 for Python, and not for us.
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)

    return is_allowed, " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


POSITIVE: Rule = (lambda value: is_whole(value) and 0 < value < LARGEST_ID, "a positive whole number")
COUNT: Rule = (_is_id, "a whole number from 0 on")
FLAG: Rule = (_is_flag, "true or false")
TEXT: Rule = (_is_text, "a text")
OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
NOT_NEGATIVE: Rule = (lambda value: is_number(value) and value >= 0, "a number from 0 on")
IDS: Rule = (lambda value: _is_id(value) or _is_list_of(_is_id)(value), "a token id or a list of them")
NOTHING: Rule = (lambda value: False, "left out: it has no place in Qwen-VL")
TOKEN: Rule = (_is_token, "a token")
TOKENS: Rule = (
    lambda value: _is_list_of(_is_token)(value if not isinstance(value, dict) else list(value.values())),
    "a list of tokens",
)
SIZE: Rule = (_is_side, f"a side in pixels (at most {LARGEST_SIDE:,}), or height and width")

GENERATION: dict[str, Rule] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams", "num_return_sequences"), POSITIVE),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size", "max_window_size"), COUNT),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "top_h", "max_time"), NOT_NEGATIVE),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), NOT_NEGATIVE),
    "repetition_penalty": (lambda value: is_number(value) and value > 0, "a positive number"),
    "length_penalty": (is_number, "a number"),
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), FLAG),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), FLAG),
    "return_dict_in_generate": FLAG,
    **dict.fromkeys(("pad_token_id", "bos_token_id"), COUNT),
    "eos_token_id": IDS,
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), IDS),
    # The published files have a list of lists, Transformers wants one of ids.
    **dict.fromkeys(
        ("stop_words_ids", "bad_words_ids"),
        (_is_list_of(_is_list_of(_is_id)), "a list of lists of token ids"),
    ),
    "stop_strings": (lambda value: _is_text(value) or _is_list_of(_is_text)(value), "a text or a list of them"),
    "early_stopping": (lambda value: _is_flag(value) or value == "never", "true, false or never"),
    **dict.fromkeys(("chat_format", "transformers_version"), TEXT),
    "cache_implementation": only("dynamic"),
    # What makes `generate` compile, quantise its cache, draw with another model, or change tokens unasked.
    **dict.fromkeys(("cache_config", "compile_config", "watermarking_config", "continuous_batching_config"), NOTHING),
    **dict.fromkeys(("custom_generate", "assistant_model", "assistant_early_exit", "prefill_chunk_size"), NOTHING),
    **dict.fromkeys(("prompt_lookup_num_tokens", "speculation_type", "constraints", "force_words_ids"), NOTHING),
    **dict.fromkeys(("dola_layers", "penalty_alpha", "guidance_scale"), NOTHING),
    **dict.fromkeys(("is_assistant", "use_mtp", "token_healing", "low_memory"), only(False)),
}

TOKENIZER: dict[str, Rule] = {
    "model_max_length": (lambda value: is_number(value) and value > 0, "a positive number"),
    **dict.fromkeys(("padding_side", "truncation_side"), only("left", "right")),
    **dict.fromkeys(("split_special_tokens", "clean_up_tokenization_spaces"), FLAG),
    **dict.fromkeys(("eos_token", "pad_token", "bos_token", "unk_token", "sep_token", "cls_token"), TOKEN),
    "mask_token": TOKEN,
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), TOKENS),
    "added_tokens_decoder": (
        lambda value: isinstance(value, dict) and all(key.isdecimal() and _is_token(value[key]) for key in value),
        "an object of tokens by id",
    ),
    "chat_template": (
        lambda value: _is_text(value) or _is_list_of(lambda one: isinstance(one, dict))(value),
        "a text",
    ),
    **dict.fromkeys(("tokenizer_class", "processor_class", "tokenizer_type"), TEXT),
    # Transformers would pass them on by position: the first is the path of the vocabulary.
    "vocab_file": only("qwen.tiktoken"),
    "init_inputs": (lambda value: value == [], "left out: it has no place in Qwen-VL"),
}

IMAGES: dict[str, Rule] = {
    **dict.fromkeys(("size", "crop_size", "pad_size"), SIZE),
    **dict.fromkeys(("do_normalize", "do_resize", "do_rescale", "do_convert_rgb", "do_pad", "do_center_crop"), FLAG),
    **dict.fromkeys(("image_processor_type", "processor_class", "feature_extractor_type"), TEXT),
}

CONFIG_FILES: dict[str, Rule] = dict.fromkeys(("transformers_weights", "configuration_files"), NOTHING)
"""Keys of `config.json` that name other files, which Transformers reads in place of these."""

RULES: dict[str, dict[str, Rule]] = {
    "config.json": CONFIG_FILES,
    "generation_config.json": GENERATION,
    "tokenizer_config.json": TOKENIZER,
    "special_tokens_map.json": {key: rule for key, rule in TOKENIZER.items() if rule in (TOKEN, TOKENS)},
    "preprocessor_config.json": IMAGES,
    "processor_config.json": IMAGES | {"n_queries": POSITIVE, "image_processor": OBJECT, "chat_template": TEXT},
    "chat_template.json": {"chat_template": TEXT},
    "base.json": {
        **dict.fromkeys(("base", "fingerprint", "own_fingerprint", "quantization"), TEXT),
        "quantize": (_is_list_of(_is_text), "a list of parts"),
    },
}
"""What the keys of each file must be. Null stands for a key that is left out."""

OBJECTS = (*RULES, "added_tokens.json", "tokenizer.json", "qwenvl.json")
TEXTS = ("qwen.tiktoken", "chat_template.jinja")

# `torch.distributed` writes these; Transformers reads them in place of a `model.safetensors` beside them.
_SHARD_OF_PROCESS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def examine_settings(folder: str | Path) -> None:
    """Read every file of a local checkpoint that loading it reads, except for its weights; milliseconds.

    Args:
        folder: of a checkpoint; files that it does not have are not missed.

    Raises:
        InputError: a file is damaged, is a link out of the folder or no file at all, or has a value that it must not
            have; names file and key.
    """
    folder = Path(folder)
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): check it and its permissions") from error
    for name in OBJECTS:
        if name in names:
            refuse_foreign_file(folder / name, folder)
            check_keys(read_json(folder / name), RULES.get(name, {}), folder / name)
    for name in TEXTS:
        if name in names:
            refuse_foreign_file(folder / name, folder)
            if name != "qwen.tiktoken":  # whose reader says which line is damaged
                read_text(folder / name)
    templates = folder / "additional_chat_templates"
    for file in sorted(templates.glob("*.jinja")) if templates.is_dir() else ():
        refuse_foreign_file(file, folder)
        read_text(file)
    if "generation_config.json" in names:
        _check_generation(folder / "generation_config.json")
    if "tokenizer_config.json" in names:
        file = folder / "tokenizer_config.json"
        methods = {name for name in dir(PreTrainedTokenizer) if callable(getattr(PreTrainedTokenizer, name))}
        refuse_names_of(PreTrainedTokenizer, read_json(file).keys() & methods, file)
    if "added_tokens.json" in names:
        for token, value in read_json(folder / "added_tokens.json").items():
            check_keys({token: value}, {token: COUNT}, folder / "added_tokens.json")
    sharded = sorted(name for name in names if _SHARD_OF_PROCESS.fullmatch(name))
    if sharded:
        raise InputError(
            f"{folder / sharded[0]} is one process's part of a distributed checkpoint, which Transformers would load "
            "in place of the others: write the model into one folder with save_pretrained, or remove these files"
        )


def check_keys(content: dict[str, Any], rules: dict[str, Rule], file: Path | str) -> None:
    """Compare a file's values with what they must be.

    Raises:
        InputError: names the file and the first key that is wrong.
    """
    for key, (is_right, words) in rules.items():
        value = content.get(key)
        if value is not None and not is_right(value):
            raise InputError(f"{file}: {key} is {shortened(value)} instead of {words}: correct the file")


def refuse_names_of(kind: type, keys: Iterable[str], file: Path | str) -> None:
    """Check that no key of a file would replace a method or a property of the object that is made from it.

    Raises:
        InputError: names the key.
    """
    for key in keys:
        if hasattr(kind, key) or (key.startswith("__") and key.endswith("__")):
            raise InputError(f"{file}: {key} is no setting, but a part of the program: remove the key")


def shortened(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_generation(file: Path) -> None:
    """What `GenerationConfig` itself refuses, such as `num_beams` that contradict each other."""
    content = read_json(file)
    refuse_names_of(GenerationConfig, content, file)
    try:
        GenerationConfig(**content)
    except (ValueError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file}: its settings cannot be used ({reason}): correct the file") from error
