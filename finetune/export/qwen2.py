"""The language model as a Transformers `Qwen2ForCausalLM` folder, which servers and converters know; vision beside it.

Qwen-VL's language model and Qwen2 compute the same from tensors of different names, up to `seq_length` tokens. Qwen2
has no vision side: that is written to `visual/`, and `prompt_embeddings.py` turns images and messages into the
embeddings that the language model then takes instead of ids.
"""

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from finetune.errors import Failed
from finetune.export import qwen2_prompt_embeddings
from finetune.export.model_card import write_card
from finetune.export.qwen2_tokenizer import write_tokenizer
from finetune.export.tensors import ExportedTensor, dtype_name, written_dtype
from finetune.files.atomic_writes import write_text
from finetune.files.checkpoint_folder import (
    CONFIG,
    GENERATION_CONFIG,
    companion_files,
    companion_folder,
    copy_file,
    dtype_settings,
    own_card,
    read_generation_config,
    read_json,
)
from qwenvl import QwenVLConfig, QwenVLTokenizer
from qwenvl.checkpoint.checkpoint_files import StoredTensor, locate_tensors
from qwenvl.checkpoint.record import trained_as
from qwenvl.model.generation import read_published_settings, reply_as_trained
from qwenvl.text.vocabulary import END_OF_TEXT, IM_END, Vocabulary

VISUAL = "visual"
VISUAL_WEIGHTS = "visual.safetensors"
SCRIPT = "prompt_embeddings.py"
SOURCE_CARD = "README.source.md"
VOCABULARY = "qwen.tiktoken"
VISUAL_PREFIX = "transformer.visual."

# Qwen2's name of each tensor of a block. The fused c_attn holds q, k and v, a third each.
BLOCK_NAMES = {
    "ln_1.weight": "input_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
OTHER_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}

# The source's files that `prompt_embeddings.py` needs to render a conversation and prepare an image.
VISUAL_COMPANIONS = ("*.tiktoken", "tokenizer_config.json", "*processor_config.json")
LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "Tongyi*LICENSE*")
SETTINGS = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")

QWEN2_USE = """\
Text, with Transformers' own classes:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
```

"""
QWEN2_IMAGES = """\
Images come in as prompt embeddings. `prompt_embeddings.py` makes them; it needs the package `qwenvl` on the machine
that runs it, which need not be the server:

```python
from prompt_embeddings import PromptEncoder

encoder = PromptEncoder(folder)
parts = [{"type": "image", "image": "image.jpg"}, {"type": "text", "text": "What is in the image?"}]
prompt = encoder([{"role": "user", "content": parts}])
reply = model.generate(inputs_embeds=prompt.embeddings, attention_mask=prompt.attention_mask, max_new_tokens=256)
print(tokenizer.decode(reply[0], skip_special_tokens=True))
```

With a server that takes prompt embeddings (vLLM: `vllm serve FOLDER --enable-prompt-embeds`):

```
python prompt_embeddings.py --image image.jpg "What is in the image?" --server http://localhost:8000/v1 --name FOLDER
```

For many clients, the chat API with images before that server, which nobody else should be able to reach:

```
finetune serve FOLDER --engine vllm --at http://localhost:8000 --port 9000
```

"""


def limits(config: QwenVLConfig) -> list[str]:
    """What the exported model does not do, for the card and the terminal."""
    lines = []
    if config.use_dynamic_ntk or config.use_logn_attn:
        missing = [
            *(["dynamic NTK"] if config.use_dynamic_ntk else []),
            *(["log-n attention"] if config.use_logn_attn else []),
        ]
        lines.append(
            f"Equal to the source up to {config.seq_length:,} tokens of prompt and reply together. Beyond that, the "
            f"source uses {' and '.join(missing)}, which Qwen2 does not have: replies to longer contexts differ, and "
            f"get worse. `max_position_embeddings` is {config.seq_length:,} for that reason."
        )
    lines.append(
        "A control token spelled in a text (`<|im_end|>`, `<ref>`) becomes that token with this folder's tokenizer: "
        "remove it from text that others wrote. `qwenvl` reads it as text."
    )
    if config.visual is not None:
        lines.append(
            "This folder by itself reads text only. Images go in as prompt embeddings, made by `prompt_embeddings.py` "
            "from what is in `visual/`."
        )
    return lines


def plan_language(
    config: QwenVLConfig, stored: dict[str, StoredTensor], dtype: torch.dtype | None
) -> list[ExportedTensor]:
    """Every tensor of the Qwen2 model, in the order of its layers.

    Args:
        stored: of a whole checkpoint.
        dtype: to write; None as stored.
    """

    def tensor(name: str, source: str, rows: tuple[int, int] | None = None) -> ExportedTensor:
        return ExportedTensor(name, stored[source], written_dtype(stored[source], dtype), rows)

    width = config.num_attention_heads * config.kv_channels

    def block(number: int) -> Iterator[ExportedTensor]:
        ours, theirs = f"transformer.h.{number}.", f"model.layers.{number}."
        for third, part in enumerate("qkv"):
            for kind in ("weight", "bias"):
                rows = (third * width, (third + 1) * width)
                yield tensor(f"{theirs}self_attn.{part}_proj.{kind}", f"{ours}attn.c_attn.{kind}", rows)
        for name, qwen2_name in BLOCK_NAMES.items():
            yield tensor(theirs + qwen2_name, ours + name)

    embeddings, *others = OTHER_NAMES.items()
    plan = [tensor(embeddings[1], embeddings[0])]
    for number in range(config.num_hidden_layers):
        plan += block(number)
    return plan + [tensor(qwen2_name, name) for name, qwen2_name in others]


def plan_visual(
    config: QwenVLConfig, stored: dict[str, StoredTensor], dtype: torch.dtype | None
) -> list[ExportedTensor]:
    """Every tensor of the vision side, by its name within `VisionTransformer`; none of a text model."""
    if config.visual is None:
        return []
    return [
        ExportedTensor(name.removeprefix(VISUAL_PREFIX), tensor, written_dtype(tensor, dtype))
        for name, tensor in stored.items()
        if name.startswith(VISUAL_PREFIX)
    ]


def write_companions(
    folder: Path, base: str, tokenizer: QwenVLTokenizer, config: QwenVLConfig, dtype: torch.dtype
) -> None:
    """Write everything beside the weights except the card: configs, tokenizer, licence, the files of the vision side.

    Args:
        folder: of the export, which has a folder `visual` unless it is a text model.
        base: the checkpoint that is exported: folder or hub id.
        tokenizer, config: of `base`.
        dtype: of the written weights.

    Raises:
        UserError: a file of `base` is damaged, or its vocabulary cannot be written as a `tokenizer.json`.
    """
    settings = generation_settings(base, tokenizer, config)
    is_chat = settings["eos_token_id"] != tokenizer.eod_id
    _write_json(folder / CONFIG, qwen2_config(config, settings, dtype))
    _write_json(folder / GENERATION_CONFIG, settings)
    source = companion_folder(base)
    vocabulary_file = source / VOCABULARY  # its reader has found it
    write_tokenizer(
        Vocabulary(vocabulary_file.read_bytes(), str(vocabulary_file)),
        folder,
        eos_token=IM_END if is_chat else END_OF_TEXT,
        max_length=config.seq_length,
    )
    _copy(source, folder, LICENSES)
    if config.visual is not None:
        _copy(source, folder / VISUAL, VISUAL_COMPANIONS)
        read = read_json(source / CONFIG)
        _write_json(folder / VISUAL / CONFIG, read | dtype_settings(read, dtype))
        # Its docstring tells its users what it needs. Here it is a module, so that it is checked and tested like one.
        shutil.copyfile(qwen2_prompt_embeddings.__file__, folder / SCRIPT)


def qwen2_config(config: QwenVLConfig, settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` of the Qwen2 model, in keys that old and new Transformers read.

    Args:
        settings: see `generation_settings`.
        dtype: of the weights.
    """
    written = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size // 2,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_length,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.layer_norm_epsilon,
        "rope_theta": float(config.rotary_emb_base),
        "attention_dropout": config.attn_dropout_prob,
        "use_cache": True,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": settings["eos_token_id"],
        "pad_token_id": settings["pad_token_id"],
        "torch_dtype": dtype_name(dtype),
    }
    if config.kv_channels * config.num_attention_heads != config.hidden_size:
        written["head_dim"] = config.kv_channels
    return written


def generation_settings(base: str, tokenizer: QwenVLTokenizer, config: QwenVLConfig) -> dict[str, Any]:
    """`generation_config.json`: where replies end, and how the source decodes by default."""
    read = read_published_settings(read_generation_config(base), config)
    reply_as_trained(read, config, trained_as(base))
    written = {
        "eos_token_id": tokenizer.eod_id if read.eos_token_id is None else read.eos_token_id,
        "pad_token_id": tokenizer.eod_id if read.pad_token_id is None else read.pad_token_id,
    }
    return written | {key: getattr(read, key) for key in SETTINGS if getattr(read, key) is not None}


def check_folder(folder: Path, ours: QwenVLTokenizer) -> None:
    """Open what was written as its users will, except the weights' values, which were compared already.

    Args:
        folder: of the export, complete except for the card.
        ours: the source's tokenizer.

    Raises:
        Failed: Transformers' Qwen2 has other tensors, or the tokenizer gives other ids.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config.from_pretrained(folder))
    there = {name: tensor.shape for name, tensor in locate_tensors(folder).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if there != expected:
        wrong = sorted(name for name in there.keys() | expected.keys() if there.get(name) != expected.get(name))
        raise Failed(f"Qwen2ForCausalLM does not take what was written, {wrong[0]} for one. Nothing was kept")
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in SAMPLE_TEXTS:
        ids = ours.encode_text(text)
        if theirs.encode(text) != ids or theirs.decode(ids) != ours.decode(ids):
            raise Failed(f"the written tokenizer gives other ids for {text!r} than the source's. Nothing was kept")
    for token, token_id in ours.control_tokens.items():
        if theirs.encode(token) != [token_id]:
            raise Failed(f"the written tokenizer does not know {token}. Nothing was kept")


def write_qwen2_card(
    folder: Path,
    base: str,
    config: QwenVLConfig,
    *,
    title: str,
    fingerprint: str,
    facts: dict[str, Any],
    training: list[str],
) -> None:
    """Write the card, and keep the source's beside it where it has one."""
    source_card = own_card(companion_folder(base))
    if source_card is not None:
        copy_file(source_card, folder / SOURCE_CARD)
        facts = {**facts, "the source's own card": f"[{SOURCE_CARD}]({SOURCE_CARD})"}
    write_card(
        folder,
        title=title,
        base=base,
        fingerprint=fingerprint,
        facts=facts,
        notes=limits(config),
        training=training,
        tags=["qwen2"],
        use=(QWEN2_USE + (QWEN2_IMAGES if config.visual is not None else "")).rstrip() + "\n",
    )


def _copy(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for file in companion_files(source):
        if any(fnmatch(file.name, pattern) for pattern in patterns):
            copy_file(file, folder / file.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


SAMPLE_TEXTS = (
    "What is written in the image, and where?\nCount: 1, 23, 4,567.89 €.",
    "It's  two   spaces,\r\n\r\n\ttabs\u00a0and a no-break space; WE'LL see.",
    "图中有什么？请框出狗的位置。日本語のテキストと한국어",
    "Cafe\u0301 nai\u0308ve, \U0001f469\u200d\U0001f4bb, \u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u1ed7\u0323 \u017f's 'S \u00ad\u2028x",
    "def f(x):\n    return x ** 2  # ...\n\n\n",
)
