"""The language model as a GGUF file for llama.cpp, vision beside it as safetensors, in one folder.

`finetune serve` and `finetune chat` run it: the vision side in PyTorch, the language model in llama.cpp. Its sizes are
those of the qwen2 export, whose tensors it has under llama.cpp's names.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError
from finetune.export.folder import writing_errors
from finetune.export.gguf_check import check_gguf
from finetune.export.gguf_file import GgufTensor, plan_gguf, write_gguf
from finetune.export.gguf_types import BITS
from finetune.export.model_card import training_sections, write_card
from finetune.export.qwen2 import LICENSES, SOURCE_CARD, generation_settings, plan_language, plan_visual
from finetune.export.qwen2_tokenizer import TEXT_CHAT_TEMPLATE
from finetune.export.tensors import ExportedTensor, check_written, pieces, planned
from finetune.files.atomic_writes import writing_large_folder
from finetune.files.base_identity import identify
from finetune.files.byte_progress import byte_progress
from finetune.files.checkpoint_folder import (
    chat_settings,
    companion_folder,
    copy_companions,
    copy_file,
    own_card,
    read_config,
    read_tokenizer,
)
from finetune.files.disk_space import check_disk_space
from finetune.files.tensor_files import SINGLE_NAME, write_tensors
from finetune.llamacpp.folder import NO_VISUAL, VISUAL_FILE, VISUAL_KEY, WEIGHTS_KEY, read_folder, visual_digest
from finetune.llamacpp.library import INSTALL, library, quantize_chunk
from finetune.quantities import format_bytes
from finetune.terminal import Say
from qwenvl import QwenVLConfig, QwenVLTokenizer
from qwenvl.checkpoint.checkpoint_files import StoredTensor
from qwenvl.checkpoint.record import BaseNote, trained_as, write_record
from qwenvl.text.fast_tokenizer import merged_pairs
from qwenvl.text.vocabulary import Vocabulary

FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2, "q4_k_m": 15}
"""`general.file_type`: llama.cpp's LLAMA_FTYPE."""

NORMAL, CONTROL, UNUSED = 1, 3, 5
"""Types of tokens."""

USE = """\
```
finetune chat path/to/this/folder --image image.jpg
finetune serve path/to/this/folder
```

Both need `pip install "qwenvl-finetune[llamacpp]"`. They write the prompt, encode images with PyTorch from what is in
`visual/`, and run the language model in llama.cpp, as many requests at a time as its memory for tokens takes.

Text alone works with llama.cpp's own programs: `llama-cli -m FILE.gguf`. Images do not: llama.cpp has no vision side
for this model, and its server takes no embeddings.
"""


def prepare_gguf(config: QwenVLConfig, base: str) -> None:
    """Check that a GGUF file can be written of a model, and checked here.

    Raises:
        UserError: packages are missing, or llama.cpp's qwen2 cannot have these sizes.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"--to gguf needs the package gguf: {INSTALL}")
    library()
    quantize_chunk()
    if config.num_attention_heads * config.kv_channels != config.hidden_size:
        raise UserError(
            f"{base}: {config.num_attention_heads} heads of {config.kv_channels} are not as wide as the hidden states "
            f"({config.hidden_size}), as llama.cpp's qwen2 has them: this model has no GGUF form"
        )


def export_gguf(
    base: str,
    stored: Mapping[str, StoredTensor],
    folder: Path,
    *,
    kind: str,
    run: Path | None,
    title: str,
    threads: int,
    say: Say,
) -> None:
    """Write a checkpoint's GGUF folder; it appears complete, and compared with the checkpoint, or not at all.

    Args:
        base: checkpoint folder or hub id.
        stored: its tensors.
        folder: to write.
        kind: one of `gguf_types.TYPES`.
        run: that trained it, for its card; None where there is none.
        title: of the card.
        threads: for llama.cpp, in the check.
        say: prints a labelled line.

    Raises:
        InputError: something in the checkpoint does not fit.
        Failed: it could not be written, or llama.cpp does not compute what the checkpoint does.
    """
    config, tokenizer, training = read_config(base), read_tokenizer(base), training_sections(run)
    language = plan_gguf(plan_language(config, dict(stored), None), kind, config.num_hidden_layers)
    visual = plan_visual(config, dict(stored), None)
    _say_left_out(stored, language, visual, say)
    language_bytes = sum(tensor.nbytes for tensor in language)
    needed = language_bytes + sum(tensor.planned.nbytes for tensor in visual)
    check_disk_space(folder, needed + 60_000_000, "the exported folder")
    identity = identify(base)
    with writing_errors(folder), writing_large_folder(folder) as partial:
        file = partial / f"model-{kind}.gguf"
        with byte_progress("writing", needed) as progress:
            hashes = _write_visual(partial, visual, progress)
            digest = visual_digest(partial / VISUAL_FILE) if visual else NO_VISUAL

            def metadata(writer: Any) -> None:
                _add_metadata(writer, base, config, tokenizer, kind, title)
                writer.add_string(WEIGHTS_KEY, identity.fingerprint)
                writer.add_string(VISUAL_KEY, digest)

            write_gguf(file, metadata, language, progress)
            say("written", progress.rate())
        _write_companions(partial, base)
        write_record(partial, replace(trained_as(base), base=BaseNote(base, identity), own_weights=None))
        if visual:
            check_written(partial, hashes, visual, lambda count: None)
        check_gguf(read_folder(partial), stored, kind, threads=threads, say=say)
        facts = {
            "language model": f"{file.name}, {format_bytes(file.stat().st_size)}, {BITS[kind]} bits a weight",
            "context": f"{config.seq_length:,} tokens",
        }
        if visual:
            facts["vision side"] = f"visual/, {format_bytes((partial / VISUAL_FILE).stat().st_size)}, as in the source"
        source_card = own_card(companion_folder(base))
        if source_card is not None:
            copy_file(source_card, partial / SOURCE_CARD)
            facts["the source's own card"] = f"[{SOURCE_CARD}]({SOURCE_CARD})"
        write_card(
            partial,
            title=f"{title}, language model as GGUF ({kind})",
            base=base,
            fingerprint=identity.fingerprint,
            facts=facts,
            notes=limits(config, kind),
            training=training,
            tags=["gguf", "llama.cpp"],
            use=USE,
        )
    for line in limits(config, kind):
        say("note", line)


def limits(config: QwenVLConfig, kind: str) -> list[str]:
    """What the exported model does not do, for the card and the terminal."""
    lines = [
        f"At most {config.seq_length:,} tokens of prompt and reply together: beyond, the source stretches its "
        "positions, which llama.cpp does not do for this model. `finetune serve` and `finetune chat` refuse longer "
        "prompts, and end replies there."
    ]
    if kind == "f16":
        lines.append("Weights of bfloat16 below float16's smallest numbers (6e-8) are 0.")
    else:
        head = "" if kind == "q8_0" else ", the output head in q6_K (q8_0 where its width is no multiple of 256)"
        lines.append(
            f"The language model's matrices are in {kind}{head}, norms and biases in float32, the vision side as in "
            "the source: an approximation. Measure it on your own task before relying on it."
        )
    lines.append(
        "A control token spelled in a text (`<|im_end|>`, `<ref>`) becomes that token in llama.cpp's own programs: "
        "remove it from text that others wrote. `finetune` reads it as text."
    )
    return lines


def _say_left_out(
    stored: Mapping[str, StoredTensor], language: list[GgufTensor], visual: list[ExportedTensor], say: Say
) -> None:
    taken = {tensor.source.source.name for tensor in language} | {tensor.source.name for tensor in visual}
    if unknown := sorted(stored.keys() - taken):
        say("note", f"left out, as no part of the model: {', '.join(unknown[:3])} ({len(unknown)} tensors)")


def _write_visual(partial: Path, visual: list[ExportedTensor], progress: Any) -> dict[str, str]:
    """Write the vision side; its hash by its name."""
    if not visual:
        return {}
    (partial / VISUAL_FILE.parent).mkdir()
    hashes = write_tensors(partial / VISUAL_FILE.parent, planned(visual), pieces(visual), math.inf, progress)
    (partial / VISUAL_FILE.parent / SINGLE_NAME).rename(partial / VISUAL_FILE)
    return {str(VISUAL_FILE): hashes[SINGLE_NAME]}


def _write_companions(partial: Path, base: str) -> None:
    """The source's files that say how it is asked; not its code, its font and its draft of a chat template."""
    names = copy_companions(base, partial, generation=chat_settings(base, trained_as(base).chat_format))
    kept = ("*.json", "*.tiktoken", *LICENSES)
    for name in names:
        if not any(fnmatch(name, pattern) for pattern in kept):
            (partial / name).unlink()


def _add_metadata(
    writer: Any, base: str, config: QwenVLConfig, tokenizer: QwenVLTokenizer, kind: str, title: str
) -> None:
    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(FILE_TYPES[kind])
    if kind != "f16":
        writer.add_quantization_version(2)
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size // 2)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_rope_freq_base(float(config.rotary_emb_base))
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    vocabulary_file = companion_folder(base) / "qwen.tiktoken"
    vocabulary = Vocabulary(vocabulary_file.read_bytes(), str(vocabulary_file))
    strings = list(vocabulary.token_strings)
    spare = config.vocab_size - len(strings)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*strings, *(f"[PAD{len(strings) + number}]" for number in range(spare))])
    kinds = [NORMAL] * vocabulary.ordinary_size + [CONTROL] * len(vocabulary.control_tokens) + [UNUSED] * spare
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{strings[left]} {strings[right]}" for left, right in merged_pairs(vocabulary)])
    settings = generation_settings(base, tokenizer, config)
    stops = settings["eos_token_id"]
    writer.add_eos_token_id(stops if isinstance(stops, int) else stops[0])
    writer.add_pad_token_id(settings["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEXT_CHAT_TEMPLATE)


def default_threads() -> int:
    """As many as PyTorch computes with."""
    return torch.get_num_threads()
