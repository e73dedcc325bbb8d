"""A folder of `finetune export --to gguf`, opened: vision in PyTorch, the language model in llama.cpp."""

from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.errors import UserError
from finetune.llamacpp.folder import GgufFolder, check_language, read_folder
from finetune.llamacpp.language_model import MOST_SEQUENCES, LanguageModel
from finetune.llamacpp.vision_tower import VisionTower
from finetune.quantities import format_bytes
from finetune.replies.llamacpp_decoder import LlamaCppDecoder
from finetune.replies.model_style import ModelUse, unknown_style
from finetune.replies.stop_ids import stop_ids_as_trained
from finetune.replies.task_replies import Style
from qwenvl import QwenVLConfig, QwenVLImageProcessor, QwenVLTokenizer, load_processor
from qwenvl.checkpoint.record import trained_as
from qwenvl.loading import ModelSource

TOKENS_OF_A_ROW = 64
"""Fewest tokens for each row that is opened."""


@dataclass(frozen=True)
class GgufModel:
    """What replies.

    Attributes:
        folder: that it was opened from.
        language: the language model, which the decoder alone uses.
        tower: the vision side; None of a text-only model.
        decoder: of replies.
        tokenizer: of the model.
        image_processor: of the model; None of a text-only one.
        stop_ids: tokens at which a reply ends.
        threads: that llama.cpp computes with.
    """

    folder: GgufFolder
    language: LanguageModel
    tower: VisionTower | None
    decoder: LlamaCppDecoder
    tokenizer: QwenVLTokenizer
    image_processor: QwenVLImageProcessor | None
    stop_ids: tuple[int, ...]
    threads: int

    @property
    def config(self) -> QwenVLConfig:
        return self.folder.config

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(images, 3, S, S) uint8 -> (images, n_queries, hidden) float32."""
        assert self.tower is not None, "a text-only model has no images"
        return self.tower.encode(pixels)

    def memory(self) -> list[str]:
        """What it takes of memory, in words."""
        mapped = f"{self.folder.language.name}: {format_bytes(self.language.weight_bytes)} of weights"
        cache = f"keys and values of {self.language.cells:,} tokens: {format_bytes(self.language.cache_bytes)}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        lines = [f"{mapped} in the file's mapping, {cache}; {threads}"]
        if self.folder.visual is not None:
            size = format_bytes(self.folder.visual.stat().st_size)
            lines.append(f"vision side: {size} in the file's mapping, of which a block at a time is in memory")
        return lines


def gguf_use(path: str | Path, style: Style | None = None) -> tuple[GgufFolder, ModelUse]:
    """How a folder is asked; no weights are read.

    Raises:
        InputError: a part of it is missing or damaged, or nothing says how it is asked.
    """
    folder = read_folder(path)
    source, record = ModelSource(str(folder.path), None), trained_as(folder.path)
    if record.quantize:
        raise UserError(
            f"{folder.path / 'qwenvl.json'} names parts in 4 bits of bitsandbytes ({', '.join(record.quantize)}), "
            "which no GGUF folder has: it is of another folder. Restore the folder's own"
        )
    asked = (style, f"--style {style}") if style is not None else (record.style, record.read_from)
    if asked[0] is None:
        raise UserError(unknown_style(path, source))
    return folder, ModelUse(str(path), source, record, asked[0], asked[1], (), "")


def open_gguf(
    folder: GgufFolder, use: ModelUse, *, rows: int, tokens: int | None = None, threads: int | None = None
) -> GgufModel:
    """Open a folder.

    Args:
        folder, use: as `gguf_use` gives them.
        rows: most replies that grow together.
        tokens: of prompts and replies together, whose keys and values are in memory; None for one context.
        threads: for llama.cpp; None for as many as PyTorch has.

    Raises:
        InputError: a part of it is damaged, or of another folder; llama.cpp is not there.
        Failed: llama.cpp does not get the memory.
    """
    config = folder.config
    threads = torch.get_num_threads() if threads is None else threads
    cells = config.seq_length if tokens is None else tokens
    # Each has memory for its logits; a reply to an image has some hundred tokens with its prompt.
    rows = min(rows, MOST_SEQUENCES // 2, -(-cells // TOKENS_OF_A_ROW))
    sequences = 2 * rows  # as many again for rows that have left
    tokenizer = QwenVLTokenizer.from_pretrained(folder.path)
    image_processor = None if folder.visual is None else load_processor(folder.path).image_processor
    tower = None if folder.visual is None else VisionTower(folder.visual, config)
    language = LanguageModel(folder.language, cells=cells, sequences=sequences, threads=threads)
    try:
        check_language(folder, language)
    except BaseException:
        language.close()
        raise
    return GgufModel(
        folder,
        language,
        tower,
        LlamaCppDecoder(language, config, rows=rows, sequences=sequences),
        tokenizer,
        image_processor,
        stop_ids_as_trained(folder.path, config, use.record, tokenizer, use.style),
        threads,
    )
