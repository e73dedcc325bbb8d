"""Malformed checkpoint folders, each by one change to a good one."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from folder_changes import (
    INDEX,
    POINTER,
    TINY,
    WEIGHTS,
    Case,
    Change,
    both,
    cut,
    link_out,
    link_to,
    put,
    put_bin,
    put_folder,
    put_json,
    put_pipe,
    put_visual,
    remove,
    sharded,
    with_tensor,
    without,
)
from safetensors.torch import load_file, save_file

# --- JSON ------------------------------------------------------------------------------------------------------------

TEXTS_NOT_AN_OBJECT = {
    "empty": b"",
    "blank": b" \n",
    "an open brace": b"{",
    "cut": b'{"a": 1, "b"',
    "a trailing comma": b'{"a": 1,}',
    "a comment": b'{"a": 1} // one',
    "two objects": b"{}{}",
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a text": b'"text"',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "invalid UTF-8": b'{"a": "\xff"}',
    "a key twice": b'{"a": 1, "a": 2}',
    "not a number": b'{"a": NaN}',
    "an infinity": b'{"a": -Infinity}',
    "a number of 5,000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "zeros": bytes(64),
    "an LFS pointer": POINTER,
    "HTML": b"<!doctype html><title>404</title>",
}

SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "preprocessor_config.json", "processor_config.json", "chat_template.json"),
    *("tokenizer.json", "base.json", "qwenvl.json"),
)


def damaged_json(name: str) -> Iterator[Case]:
    for damage, content in TEXTS_NOT_AN_OBJECT.items():
        yield f"{name} is {damage}", put(name, content)
    yield f"{name} is a folder", put_folder(name)
    yield f"{name} is a pipe", put_pipe(name)
    yield f"{name} is a device", link_to(name, "/dev/zero")
    yield f"{name} is a link to nowhere", link_to(name, "nowhere")
    yield f"{name} is a link to itself", link_to(name, name)
    yield f"{name} is a link out", link_out(name)


# --- keys ------------------------------------------------------------------------------------------------------------

NO_SIZE = (0, -1, 1.5, True, "x", [], {}, 10**9, 10**30, {"__float__": "NaN"}, {"__float__": "Infinity"})
LANGUAGE_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels", "intermediate_size"),
)
VISUAL_SIZES = ("heads", "image_size", "image_start_id", "layers", "mlp_ratio", "output_dim", "patch_size", "width")
NO_NUMBER = (0, -1, True, "x", [], 10**9, {"__float__": "NaN"}, {"__float__": "Infinity"})

KERNELS = (
    *("kernels-community/flash-attn", "kernels-community/vllm-flash-attn3", "someone/kernel:function", "nonsense"),
    *("paged|kernels-community/flash-attn", "kernels-community/flash-attn@main", ["sdpa"], {"": "a/b"}, 5, True),
)
OTHER_QUANTIZATIONS: tuple[Any, ...] = (
    *({"quant_method": method} for method in ("awq", "aqlm", "hqq", "fp8", "mxfp4", "quanto", "torchao", "x", 5)),
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_8bit": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": 5},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "nn"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"},  # the weights are not
    *([], [{}], "gptq", 5),
)
CONFIG_KEYS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("_attn_implementation", "attn_implementation"), KERNELS),
    "experts_implementation": ("kernels-community/moe",),
    "quantization_config": OTHER_QUANTIZATIONS,
    "transformers_weights": ("other.safetensors", "../other.safetensors", 5),
    "configuration_files": (["config.4.0.0.json"], ["../x/config.4.0.0.json"], 5),
    "fusion_config": ({"patch_embeddings": True}, 5),
    "distributed_config": ({"tp_size": 2}, 5),
    "per_layer_config": ({"0": {"hidden_size": 8}}, 5),
    "compression_config": ({"format": "dense"},),
    "text_config": ({"hidden_size": 8}, "x"),
    "attribute_map": ({"hidden_size": "kv_channels"}, 5),
    "rope_scaling": ({"type": "linear", "factor": 2.0},),
    "sliding_window": (4, 0, "x"),
    "layer_types": (["sliding_attention"] * 2, 5),
    "attention_chunk_size": (4,),
    "is_causal": (False, 0, "x"),
    "is_encoder_decoder": (True, 1),
    "output_hidden_states": (True, "x"),
    "output_attentions": (True, "x"),
    "return_dict": (False, 0),
    "chunk_size_feed_forward": (8, "x"),
    "tie_word_embeddings": (True, "x"),
    "no_bias": (False, "x"),
    "use_cache": ("x", 5),
    "use_dynamic_ntk": ("x", 1),
    "use_logn_attn": ("x", 1),
    "rotary_pct": (0.25, "x"),
    "layer_norm_epsilon": NO_NUMBER,
    "rotary_emb_base": tuple(value for value in NO_NUMBER if value != 10**9),
    "initializer_range": tuple(value for value in NO_NUMBER if value not in (0, 10**9)),
    "attn_dropout_prob": (-1, 1, "x", True, {"__float__": "NaN"}),
    "emb_dropout_prob": (-1, 1, "x", True, {"__float__": "NaN"}),
    "torch_dtype": ("nn", "float99", "int8", "bool", 5, [], {}),
    "dtype": ("nn", "float99", "int8", 5),
    "architectures": ("QWenLMHeadModel", [5], {}),
    "auto_map": ("x", [1]),
    "model_type": ("bert", 5, []),
    "id2label": ([], 5, {"x": "y"}, {str(n): "x" for n in range(2000)}),
    "num_labels": (10**9, -1, "x", 1.5),
    "transformers_version": (5, []),
    "tokenizer_class": (5, []),
    "problem_type": ("x", 5),
    "visual": ([], 5, "x", {}, {"heads": 4}),
    **{
        name: (5, "x", {})
        for name in ("to_dict", "from_dict", "validate", "get_text_config", "save_pretrained", "sub_configs", "update")
    },
    **dict.fromkeys(("n_queries", "image_token_id", "resampler_heads", "base_model_tp_plan", "is_remote_code"), (5,)),
}
GENERATION_KEYS: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (-1, 0, "x", 1.5, True, []),
    "max_length": ("x", -5),
    "min_length": ("x", -5),
    "top_k": ("x", -1, 1.5),
    "top_p": ("x", -1, [], {"a": 1}),
    "temperature": ("x", -1, []),
    "repetition_penalty": ("x", 0, -1),
    "do_sample": ("x", 5),
    "eos_token_id": ("x", -1, [-1], ["x"], 1.5, {}, True),
    "pad_token_id": ("x", -1, [512], 1.5),
    "num_beams": ("x", 0, -1),
    "num_return_sequences": ("x", 0),
    "early_stopping": ("x",),
    "stop_strings": (5, [5]),
    "bad_words_ids": (5, "x", [5]),
    "stop_words_ids": (5, [["x"]]),
    "chat_format": (5, []),
    "cache_implementation": ("static", "quantized", "offloaded", "paged", "hybrid", "x", 5),
    "cache_config": ({"backend": "quanto"}, 5),
    "compile_config": ({"backend": "inductor"}, 5),
    "watermarking_config": ({"greenlist_ratio": 0.5}, {"x": 1}, 5),
    "continuous_batching_config": ({"x": 1},),
    "custom_generate": ("someone/generate", {"x": 1}),
    "assistant_early_exit": (4,),
    "prompt_lookup_num_tokens": (4,),
    "prefill_chunk_size": (64,),
    "guidance_scale": (1.5,),
    "penalty_alpha": (0.6,),
    "dola_layers": ("low",),
    "constraints": (["x"],),
    "token_healing": (True,),
    "use_mtp": (True,),
    **dict.fromkeys(("validate", "to_dict", "update", "from_dict", "get_generation_mode"), (5, "x")),
    **dict.fromkeys(("__class__", "__dict__"), ("x",)),
}
TOKENIZER_KEYS: dict[str, tuple[Any, ...]] = {
    "model_max_length": ("x", 0, -1, [], True),
    "padding_side": ("x", 5, "both"),
    "truncation_side": ("x", 5),
    "eos_token": (5, [], "<nonsense>", {"content": 5}, {"x": 1}),
    "pad_token": (5, "<nonsense>"),
    "additional_special_tokens": (5, "x", [5], ["<nonsense>"]),
    "extra_special_tokens": (5, ["<nonsense>"], {"a": 5}),
    "added_tokens_decoder": ([], 5, {"x": {"content": "y"}}, {"5": 5}, {"5": {"content": "<new>"}}, {"5": {}}),
    "split_special_tokens": ("x", 5),
    "chat_template": (5, [5]),
    "tokenizer_class": (5, []),
    "vocab_file": ("/etc/hostname", "../other.tiktoken", 5),
    "init_inputs": (["/etc/hostname"], 5),
    **dict.fromkeys(("encode", "__class__"), (5,)),
}
IMAGE_KEYS: dict[str, tuple[Any, ...]] = {
    "size": ("x", 0, -1, 1.5, True, 10**9, [112, 112], {"height": 112, "width": 56}, {"shortest_edge": 112}, {}),
    "image_mean": (5, "x", [0.5, 0.5, 0.5], [1], {}),
    "image_std": ([0.5, 0.5, 0.5], "x"),
    "rescale_factor": (1.0, "x", []),
    "resample": (0, "x", {}),
    "do_resize": (False, "x", 5),
    "do_normalize": ("x", 5),
    "do_center_crop": (True,),
    "image_processor_type": (5,),
}


def wrong_keys() -> Iterator[Case]:
    for key in LANGUAGE_SIZES:
        for value in NO_SIZE:
            yield f"config.json: {key} is {short(value)}", put_json("config.json", **{key: value})
    for key in VISUAL_SIZES:
        for value in NO_SIZE:
            yield f"config.json: visual.{key} is {short(value)}", put_visual(**{key: value})
    for value in (0, 255, 400, -1, True, "x", None, 10**9, 10**12):
        yield f"config.json: visual.n_queries is {short(value)}", put_visual(n_queries=value)
    for key in ("seq_length", "max_position_embeddings"):
        for value in (0, -1, 1.5, True, "x", None):
            yield f"config.json: {key} is {short(value)}", put_json("config.json", **{key: value})
    for name, keys in (
        ("config.json", CONFIG_KEYS),
        ("generation_config.json", GENERATION_KEYS),
        ("tokenizer_config.json", TOKENIZER_KEYS),
        ("preprocessor_config.json", IMAGE_KEYS),
    ):
        for key, values in keys.items():
            for value in values:
                yield f"{name}: {key} is {short(value)}", put_json(name, **{key: value})
    for value in (5, [], ["x"], "<nonsense>", {"content": 5}):
        yield (
            f"special_tokens_map.json: eos_token is {short(value)}",
            put_json("special_tokens_map.json", eos_token=value),
        )
    for token, value in (("<new>", 5), ("<new>", "x"), ("<|im_end|>", 5), ("<new>", [])):
        yield f"added_tokens.json: {token} is {short(value)}", put_json("added_tokens.json", **{token: value})
    for value in (0, -1, "x", 1.5, True, 100, 10**9):
        yield f"processor_config.json: n_queries is {short(value)}", put_json("processor_config.json", n_queries=value)


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."


# --- weights ---------------------------------------------------------------------------------------------------------


def _set_all(shard: str) -> Change:
    def change(index: dict[str, Any], folder: Path) -> None:
        index["weight_map"] = dict.fromkeys(index["weight_map"], shard)

    return sharded(change)


def _index(**keys: Any) -> Change:
    return sharded(lambda index, folder: index.update(keys))


def _damage_shard(damage: Change) -> Change:
    return sharded(lambda index, folder: damage(folder))


def broken_weights() -> Iterator[Case]:
    names = sorted(load_file(TINY / WEIGHTS))
    for name in names:
        yield f"weights without {name}", without(name)
    matrix, vector = "transformer.h.0.mlp.w1.weight", "transformer.ln_f.weight"
    yield "weights with one more layer", with_tensor(matrix, lambda t: t, "transformer.h.2.mlp.w1.weight")
    yield "weights with an unknown tensor", with_tensor(matrix, lambda t: t, "adapter.weight")
    yield "weights with a tensor under a wrapper's name", with_tensor(matrix, lambda t: t, f"module.{matrix}")
    for what, make in (
        ("a row less", lambda t: t[:-1]),
        ("a column more", lambda t: torch.cat([t, t[:, :1]], 1)),
        ("flat", lambda t: t.reshape(-1)),
        ("empty", lambda t: t[:0]),
        ("whole numbers", lambda t: t.to(torch.int8)),
        ("true or false", lambda t: t > 0),
    ):
        yield f"weights with {matrix} {what}", with_tensor(matrix, make)
    yield "weights with a norm as a number", with_tensor(vector, lambda t: t[0])
    for share in (0, 1, 7, 8, 9, 100):
        yield f"weights cut to {share} bytes", cut(WEIGHTS, lambda size, share=share: share)
    yield "weights cut by half", cut(WEIGHTS, lambda size: size // 2)
    yield "weights cut by a byte", cut(WEIGHTS, lambda size: size - 1)
    yield "weights with a byte more", lambda folder: put(WEIGHTS, (folder / WEIGHTS).read_bytes() + b"\0")(folder)
    yield "weights with a huge header", put(WEIGHTS, (1 << 62).to_bytes(8, "little") + b"{}")
    yield "weights whose header is a list", put(WEIGHTS, (2).to_bytes(8, "little") + b"[]")
    yield "weights without tensors", put(WEIGHTS, (2).to_bytes(8, "little") + b"{}")
    for what, content in (("a pointer", POINTER), ("a text", b"hello"), ("zeros", bytes(4096)), ("HTML", b"<html>")):
        yield f"weights are {what}", put(WEIGHTS, content)
        yield f"weights as .bin are {what}", both(remove(WEIGHTS), put("pytorch_model.bin", content))
    yield "weights are a pickle", put(WEIGHTS, pickle.dumps({"a": 1}))
    yield "weights are missing", remove(WEIGHTS)
    yield "weights are a folder", put_folder(WEIGHTS)
    yield "weights are a pipe", put_pipe(WEIGHTS)
    yield "weights are a device", link_to(WEIGHTS, "/dev/zero")
    yield "weights are a link to nowhere", link_to(WEIGHTS, "nowhere")
    yield "weights are a link to themselves", link_to(WEIGHTS, WEIGHTS)
    yield "weights are a link to a text", link_to(WEIGHTS, "config.json")
    yield "a process's shard lies beside the weights", put("shard-00000-model-00001-of-00001.safetensors", b"")
    tensors = load_file(TINY / WEIGHTS)
    first = {name: tensors[name] for name in names[:3]}
    for what, content in (
        ("a list", [1, 2]),
        ("a tensor", torch.ones(2)),
        ("empty", {}),
        ("with some tensors alone", first),
        ("with a number among them", {**first, "epoch": 3}),
        ("under whole numbers", dict(enumerate(first.values()))),
        ("nested", {"state_dict": first}),
    ):
        yield f"weights as .bin, {what}", put_bin(content)
    yield "weights as .bin cut by half", both(put_bin(tensors), cut("pytorch_model.bin", lambda size: size // 2))
    yield from broken_indexes(names)


def broken_indexes(names: list[str]) -> Iterator[Case]:
    shard, other = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for value in (None, [], 5, "x", {names[0]: 5}, {names[0]: None}, {names[0]: [shard]}, {}):
        yield f"index: weight_map is {short(value)}", _index(weight_map=value)
    for place in (
        *(
            f"../{shard}",
            f"/tmp/{shard}",
            f"sub/{shard}",
            f"..\\{shard}",
            "..",
            ".",
            "",
            "config.json",
            "qwen.tiktoken",
        ),
        *(f"{shard}\0", "model.pkl", f"./{shard}", "https://example.com/model.safetensors"),
    ):
        yield f"index: everything is in {place!r}", _set_all(place)
    yield "index: everything is in one of two", _set_all(shard)

    def missing(index: dict[str, Any], folder: Path) -> None:
        index["weight_map"]["transformer.other"] = shard

    def swapped(index: dict[str, Any], folder: Path) -> None:
        index["weight_map"][names[0]] = other

    def unlisted(index: dict[str, Any], folder: Path) -> None:
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file == shard}

    def twice(index: dict[str, Any], folder: Path) -> None:
        tensors = load_file(folder / other)
        save_file({**tensors, **load_file(folder / shard)}, folder / other)

    yield "index: a tensor is in no file", sharded(missing)
    yield "index: a tensor is in another file", sharded(swapped)
    yield "index: a shard is not listed", sharded(unlisted)
    yield "index: tensors are in two files", sharded(twice)
    yield "index: a shard is missing", _damage_shard(remove(other))
    yield "index: a shard is a pointer", _damage_shard(put(other, POINTER))
    yield "index: a shard is cut", _damage_shard(cut(other, lambda size: size // 2))
    yield "index: a shard is a pipe", _damage_shard(put_pipe(other))
    yield "index: a shard is a folder", _damage_shard(put_folder(other))
    yield "index: a shard is a link to nowhere", _damage_shard(link_to(other, "nowhere"))
    for damage, content in TEXTS_NOT_AN_OBJECT.items():
        yield f"index is {damage}", both(sharded(lambda index, folder: None), put(INDEX, content))
    yield "index is a link out", both(sharded(lambda index, folder: None), link_out(INDEX))


# --- the vocabulary --------------------------------------------------------------------------------------------------


def broken_vocabularies() -> Iterator[Case]:
    lines = (TINY / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    for what, content in {
        "empty": b"",
        "a pointer": POINTER,
        "of another model": b"".join(lines[:-12]),
        "without its first line": b"".join(lines[1:]),
        "cut": b"".join(lines)[:-5],
        "with a line twice": b"".join([*lines, lines[3]]),
        "no base64": b"".join(lines[:5]) + b"??? 5\n",
        "without ranks": b"".join(line.split()[0] + b"\n" for line in lines),
        "with a negative rank": b"".join(lines[:-1]) + b"AAAA -1\n",
        "with a huge rank": b"".join(lines[:-1]) + b"AAAA " + b"9" * 5000 + b"\n",
        "zeros": bytes(4096),
        "JSON": b"{}",
    }.items():
        yield f"qwen.tiktoken is {what}", put("qwen.tiktoken", content)
    yield "qwen.tiktoken is missing", remove("qwen.tiktoken")
    yield "qwen.tiktoken is a folder", put_folder("qwen.tiktoken")
    yield "qwen.tiktoken is a pipe", put_pipe("qwen.tiktoken")
    yield "qwen.tiktoken is a device", link_to("qwen.tiktoken", "/dev/zero")
    yield "qwen.tiktoken is a link to nowhere", link_to("qwen.tiktoken", "nowhere")
    yield "qwen.tiktoken is a link out", link_out("qwen.tiktoken")
    yield "chat_template.jinja is in UTF-16", put("chat_template.jinja", "{{ x }}".encode("utf-16"))
    yield "chat_template.jinja is a link out", link_out("chat_template.jinja")
    yield "chat_template.jinja is a folder", put_folder("chat_template.jinja")


def broken_checkpoints() -> list[Case]:
    """Changes to a copy of the tiny checkpoint that make it one that must be refused."""
    return [
        *(case for name in SETTINGS for case in damaged_json(name)),
        *wrong_keys(),
        *broken_weights(),
        *broken_vocabularies(),
    ]
