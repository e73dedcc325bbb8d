"""A language model in a GGUF file, run by llama.cpp: tokens or embeddings in, logits out, for several sequences."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from finetune.errors import Failed, UserError
from finetune.llamacpp.library import last_words, library

CELLS_OF_A_BLOCK = 256
"""llama.cpp has a multiple of so many cells."""

MOST_SEQUENCES = 256
"""LLAMA_MAX_SEQ: what it is built with."""

UBATCH = 512
"""Positions that are computed at once."""


@dataclass(frozen=True)
class Positions:
    """Where the tokens or embeddings of a decode belong.

    Attributes:
        places: (length,) the position of each in its sequence, from 0.
        sequences: (length,) the sequence of each.
        outputs: (rows,) indices of those whose logits are wanted.
    """

    places: Sequence[int]
    sequences: Sequence[int]
    outputs: Sequence[int]


class LanguageModel:
    """A GGUF file, memory-mapped, and the keys and values of its live sequences. For one thread.

    Each computed position has a cell for its keys and values; sequences with a common prefix share its cells.

    Args:
        file: the GGUF file.
        cells: for all sequences together.
        sequences: most sequences, numbered from 0.
        threads: that compute.

    Raises:
        UserError: llama.cpp is not there, or the file is damaged or of another kind.
        Failed: llama.cpp does not get the memory.
    """

    def __init__(self, file: str | Path, *, cells: int, sequences: int, threads: int) -> None:
        assert 1 <= sequences <= MOST_SEQUENCES, f"{sequences} sequences"
        self._api = library()
        self._model: Any = None
        self._context: Any = None
        self._load(Path(file))
        try:
            self._make_context(cells, sequences, threads)
        except BaseException:
            self.close()
            raise
        self.cells = int(self._api.llama_n_ctx(self._context))

    def _load(self, file: Path) -> None:
        api = self._api
        settings = api.llama_model_default_params()
        # Weights stay in the file's mapping. Otherwise those of some types would be copied, for faster kernels.
        settings.use_extra_bufts = False
        last_words()
        self._model = api.llama_model_load_from_file(str(file).encode(), settings)
        if not self._model:
            raise UserError(f"{file} cannot be loaded by llama.cpp: {last_words()}. Export it anew")
        vocabulary = api.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(api.llama_vocab_n_tokens(vocabulary))
        self.hidden_size = int(api.llama_model_n_embd(self._model))
        self.layers = int(api.llama_model_n_layer(self._model))
        self.trained_context = int(api.llama_model_n_ctx_train(self._model))
        self.weight_bytes = int(api.llama_model_size(self._model))

    def _make_context(self, cells: int, sequences: int, threads: int) -> None:
        api = self._api
        settings = api.llama_context_default_params()
        settings.n_ctx = cells
        settings.n_batch = -(-cells // CELLS_OF_A_BLOCK) * CELLS_OF_A_BLOCK
        settings.n_ubatch = min(UBATCH, settings.n_batch)
        settings.n_seq_max = sequences
        settings.n_outputs_max = sequences  # not fewer
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        last_words()
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise Failed(f"llama.cpp has no room for {cells:,} tokens of keys and values: {last_words()}")
        self._memory = api.llama_get_memory(self._context)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, in float16."""
        return 2 * 2 * self.layers * self.hidden_size * self.cells

    def setting(self, key: str) -> str | None:
        """A value of the file's metadata, as text; None where it is not there."""
        memory = ctypes.create_string_buffer(4096)
        length = self._api.llama_model_meta_val_str(self._model, key.encode(), memory, len(memory))
        return None if length < 0 else memory.value.decode(errors="replace")

    def decode_tokens(self, tokens: Sequence[int], at: Positions) -> torch.Tensor:
        """Compute tokens, which are then part of their sequences.

        Args:
            tokens: (length,) ids.
            at: where they belong.

        Returns:
            (rows, vocabulary) float32: the logits after each of `at.outputs`.

        Raises:
            torch.OutOfMemoryError: there are not enough free cells. Nothing has changed then.
            Failed: llama.cpp cannot compute them.
        """
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        assert ids.min() >= 0 and ids.max() < self.vocabulary_size, "ids of the vocabulary"
        return self._decode(len(ids), at, token=ids)

    def decode_embeddings(self, embeddings: torch.Tensor, at: Positions) -> torch.Tensor:
        """As `decode_tokens`, from vectors in place of the tokens' embeddings: (length, hidden)."""
        assert embeddings.shape[1] == self.hidden_size, f"embeddings {tuple(embeddings.shape)}"
        values = np.ascontiguousarray(embeddings.detach().cpu().float().numpy())
        return self._decode(len(values), at, embd=values)

    def remove(self, sequence: int, start: int = 0) -> None:
        """Forget a sequence from a position on; cells that no other sequence has become free."""
        self._api.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def copy(self, sequence: int, into: int, length: int) -> None:
        """Let a sequence without cells begin as another does: they share the cells of the first `length` positions."""
        self._api.llama_memory_seq_cp(self._memory, sequence, into, 0, length)

    def _decode(self, length: int, at: Positions, **values: np.ndarray) -> torch.Tensor:
        api = self._api
        assert length == len(at.places) == len(at.sequences), "a place and a sequence for each"
        places = np.ascontiguousarray(at.places, dtype=np.int32)
        sequences = np.ascontiguousarray(at.sequences, dtype=np.int32)
        counts = np.ones(length, dtype=np.int32)
        wanted = np.zeros(length, dtype=np.int8)
        wanted[list(at.outputs)] = 1
        # An array of pointers, one into `sequences` for each.
        step = sequences.itemsize
        pointers = sequences.ctypes.data + np.arange(length, dtype=np.uint64) * np.uint64(step)
        batch = api.llama_batch()
        batch.n_tokens = length
        for name, array in {"pos": places, "n_seq_id": counts, "seq_id": pointers, "logits": wanted, **values}.items():
            setattr(batch, name, ctypes.cast(array.ctypes.data, dict(batch._fields_)[name]))
        last_words()
        status = api.llama_decode(self._context, batch)
        if status == 1:
            raise torch.OutOfMemoryError(f"llama.cpp has no {length:,} free cells of {self.cells:,}")
        if status != 0:
            raise Failed(f"llama.cpp could not compute {length:,} positions (status {status}): {last_words()}")
        logits = torch.empty(len(at.outputs), self.vocabulary_size)
        for row, index in enumerate(at.outputs):
            found = api.llama_get_logits_ith(self._context, index)
            logits[row] = torch.from_numpy(np.ctypeslib.as_array(found, (self.vocabulary_size,)))
        return logits

    def close(self) -> None:
        """Free everything."""
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
