"""A PEFT adapter read as what it does to its base: for each changed tensor of the checkpoint, how it is computed.

Nothing is guessed: a tensor without a place in the base, and a module that should have tensors and has none, are
refused by name before anything is computed.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError
from finetune.files.path_errors import path_errors
from finetune.merge.adapter_config import read_adapter_config
from finetune.merge.changes import Change, LowRank
from qwenvl.checkpoint.adapter_config import INIT_TAKES_FROM_BASE, plain_key, refuse_unsaved_modules
from qwenvl.checkpoint.adapter_files import ADAPTER_CONFIG, weights_file
from qwenvl.checkpoint.checkpoint_files import StoredTensor, tensors_in

PREFIX = "base_model.model."
TABLES = ("transformer.wte.weight", "lm_head.weight")
FINITE_ROWS = 1 << 24  # values that are checked for NaN at once


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter, with a place in the base for each of its tensors.

    Attributes:
        folder: where it is.
        config: its `adapter_config.json`.
        changes: base tensor's name -> what the adapter does to it.
        keys: number of tensors in the adapter.
        file: the adapter's weights.
    """

    folder: Path
    config: dict[str, Any]
    changes: dict[str, Change]
    keys: int
    file: Path

    def sha256(self) -> str:
        """Of config and weights, so that it does not depend on where the adapter is."""
        digest = hashlib.sha256()
        for file in (self.folder / ADAPTER_CONFIG, self.file):
            with path_errors(file, "read", "Make it readable, or restore it"), file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()

    def kinds(self) -> dict[str, int]:
        """How many tensors are changed in which way, to be shown."""
        counts: dict[str, int] = {}
        for change in self.changes.values():
            low_rank = change.low_rank
            for kind, there in (
                ("LoRA", low_rank is not None and low_rank.magnitude is None),
                ("DoRA", low_rank is not None and low_rank.magnitude is not None),
                ("trained in full", change.replaced is not None),
                ("rows trained in full", change.rows is not None),
                ("bias added", change.added is not None),
            ):
                if there:
                    counts[kind] = counts.get(kind, 0) + 1
        return counts


def read_adapter(folder: str | Path, base: Mapping[str, StoredTensor]) -> AdapterWeights:
    """Read an adapter and find the place of each of its tensors in the base.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
        base: the base's tensors by name.

    Raises:
        MissingFileError: no adapter in `folder`.
        UserError: it does not fit the base, is incomplete or damaged, or does something that is not understood; names
            the key.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    file = weights_file(folder)
    stored = tensors_in(file)
    refuse_unsaved_modules(folder, config, [tensor.name for tensor in stored])
    reader = _Reader(folder, config, base)
    placed = reader.place(stored)
    changes = reader.changes(placed)
    reader.refuse_missing(placed, changes)
    for tensor in stored:
        refuse_non_finite(tensor, f"{folder}: {tensor.name}")
    return AdapterWeights(folder, config, changes, len(stored), file)


def refuse_non_finite(tensor: StoredTensor, what: str) -> None:
    """Raises:
    UserError: NaN or an infinity in the tensor, or it holds no floating-point numbers.
    """
    if not tensor.dtype.is_floating_point:
        raise UserError(f"{what} is of type {tensor.dtype}: an adapter's weights are floating-point numbers")
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, FINITE_ROWS * rows // max(1, math.prod(tensor.shape)))
    for start in range(0, rows, step):
        values = tensor.read(start, start + step) if tensor.shape else tensor.read()
        low, high = torch.aminmax(values)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UserError(
                f"{what} holds NaN or infinities: the training diverged, or the file is damaged. Take the adapter of "
                "an earlier checkpoint"
            )


# How an adapter's keys end, and what the tensor is to the module named before that.
PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
}


@dataclass
class _Placed:
    """An adapter's tensors by their places in the base.

    Attributes:
        modules: name of a module -> its tensors by what they are to it (see `PARTS`).
        replaced: name of a base tensor -> the one that was trained in full.
    """

    modules: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    replaced: dict[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reader:
    """Compares an adapter's tensors with its settings and with the base.

    Attributes:
        folder: of the adapter.
        config: as `read_adapter_config` returns it.
        base: the base's tensors by name.
    """

    folder: Path
    config: dict[str, Any]
    base: Mapping[str, StoredTensor]

    def place(self, tensors: Iterable[StoredTensor]) -> _Placed:
        """Find the place of each of the adapter's tensors.

        Raises:
            UserError: one has no place in the base, is there twice, or should not be there; names it.
        """
        placed = _Placed()
        for tensor in tensors:
            key = tensor.name
            name = plain_key(key.removeprefix(PREFIX))
            if not key.startswith(PREFIX):
                raise self._error(key, f"does not begin with {PREFIX}, as PEFT's keys do")
            end = next((end for end in PARTS if name.endswith(end)), None)
            if end is None:
                # PEFT names the own tensors of a module that has LoRA with base_layer.
                name = name.replace(".base_layer.", ".")
                self._refuse_replacing(key, name, tensor, placed)
                placed.replaced[name] = tensor
                continue
            module = name.removesuffix(end)
            if f"{module}.weight" not in self.base:
                raise self._error(key, f"has no place: the base has no {module}.weight")
            parts = placed.modules.setdefault(module, {})
            if PARTS[end] in parts:
                raise self._error(key, "is there twice, in two spellings")
            parts[PARTS[end]] = tensor
        return placed

    def _refuse_replacing(self, key: str, name: str, tensor: StoredTensor, placed: _Placed) -> None:
        if name not in self.base:
            raise self._error(key, f"has no place: the base has no {name}")
        if name in placed.replaced:
            raise self._error(key, "is there twice, in two spellings")
        if not self._trained_in_full(name):
            raise self._error(
                key, f"is not among what {ADAPTER_CONFIG} says is trained in full (modules_to_save, bias)"
            )
        if tensor.shape != self.base[name].shape:
            raise self._error(key, f"has shape {list(tensor.shape)}, the base's has {list(self.base[name].shape)}")

    def changes(self, placed: _Placed) -> dict[str, Change]:
        """Base tensor's name -> what the adapter does to it.

        Raises:
            UserError: a tensor is missing, or has another shape than the settings and the base say; names it.
        """
        changes = {name: Change(replaced=tensor) for name, tensor in placed.replaced.items()}

        def add(name: str, **what: Any) -> None:
            changes[name] = replace(changes.get(name, Change()), **what)

        for module, parts in placed.modules.items():
            weight = f"{module}.weight"
            if "rows" in parts:
                add(weight, rows=self._rows(module, parts["rows"]))
            if parts.keys() - {"rows"}:
                low_rank = self._low_rank(module, parts)
                add(weight, low_rank=low_rank)
                if "b_bias" in parts:
                    add(f"{module}.bias", added=self._added(module, parts["b_bias"], low_rank.scale))
        return changes

    def refuse_missing(self, placed: _Placed, changes: Mapping[str, Change]) -> None:
        """Raises:
        UserError: something that the config says was trained has no weights in the adapter.
        """
        for module in self._saved_modules():
            expected = [name for name in self.base if _is_within(name, module)]
            missing = [name for name in expected if name not in placed.replaced]
            if missing or not expected:
                what = missing[0] if missing else f"{module}, which the base does not have"
                raise UserError(
                    f"{self.folder}: {ADAPTER_CONFIG} says that {module} was trained in full (modules_to_save), but "
                    f"the adapter lacks {what}. Without it the merged model would not be the trained one: save the "
                    "adapter again from the training's checkpoint"
                )
        for module in self._targets():
            if changes.get(f"{module}.weight", Change()).low_rank is None:
                raise UserError(
                    f"{self.folder}: {ADAPTER_CONFIG} says that {module} has LoRA (target_modules), but the adapter "
                    f"lacks {PREFIX}{module}.lora_A.weight and lora_B.weight: it is not complete"
                )
        for name in self._token_rows():
            if changes.get(f"{name}.weight", Change()).rows is None:
                raise UserError(
                    f"{self.folder}: {ADAPTER_CONFIG} says that rows of {name} were trained "
                    f"(trainable_token_indices), but the adapter lacks {PREFIX}{name}.token_adapter"
                )
        if self.config.get("bias") == "all":
            missing = [name for name in self.base if name.endswith(".bias") and name not in placed.replaced]
            if missing:
                raise UserError(f"{self.folder}: bias is all, but the adapter lacks {PREFIX}{missing[0]}")

    def _low_rank(self, module: str, parts: Mapping[str, StoredTensor]) -> LowRank:
        embedding = "embedding_a" in parts or "embedding_b" in parts
        if embedding and ("a" in parts or "b" in parts):
            raise self._error(f"{PREFIX}{module}", "has LoRA of a linear layer and of an embedding")
        key = f"{PREFIX}{module}.lora_"
        names = {"embedding_a": "embedding_A", "embedding_b": "embedding_B", "a": "A.weight", "b": "B.weight"}
        first, second = ("embedding_a", "embedding_b") if embedding else ("a", "b")
        for part in (first, second):
            if part not in parts:
                raise self._error(key + names[part], "is missing: LoRA needs both of its matrices")
        a, b, weight = parts[first], parts[second], self.base[f"{module}.weight"]
        rank, alpha = self._rank_and_alpha(module)
        expected: dict[str, tuple[float, ...]]
        if embedding:
            expected = {first: (rank, weight.shape[0]), second: (weight.shape[-1], rank)}
        else:
            kernel = (1,) * (len(weight.shape) - 2)
            expected = {first: (rank, *weight.shape[1:]), second: (weight.shape[0], rank, *kernel)}
        for part, shape in expected.items():
            if parts[part].shape != shape:
                raise self._error(
                    key + names[part],
                    f"has shape {list(parts[part].shape)}; by rank ({rank}) and base it should have {list(shape)}",
                )
        magnitude = parts.get("magnitude")
        if bool(self.config.get("use_dora")) != (magnitude is not None):
            what = "is missing (use_dora is true)" if magnitude is None else "is there, but use_dora is not true"
            raise self._error(key + "magnitude_vector", what)
        if magnitude is not None and embedding:
            raise self._error(key + "magnitude_vector", "is DoRA on an embedding, which cannot be merged here")
        # PEFT stores that of a convolution with the axes of the kernel.
        by_row = (1, weight.shape[0], 1, 1) if len(weight.shape) == 4 else weight.shape[:1]
        if magnitude is not None and magnitude.shape != by_row:
            raise self._error(key + "magnitude_vector", f"has shape {list(magnitude.shape)}, not {list(by_row)}")
        if bool(self.config.get("lora_bias")) != ("b_bias" in parts):
            what = "is there, but lora_bias is not true" if "b_bias" in parts else "is missing (lora_bias is true)"
            raise self._error(key + "B.bias", what)
        init = self.config.get("init_lora_weights", True)
        init = init if init in INIT_TAKES_FROM_BASE else None
        if init and len(weight.shape) != 2:
            raise self._error(key + names[first], f"is {init} on a convolution, which cannot be merged here")
        scale = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        return LowRank(a, b, scale, magnitude, embedding, init)

    def _rank_and_alpha(self, module: str) -> tuple[float, float]:
        from peft.utils.other import get_pattern_key

        ranks: dict[str, float] = self.config.get("rank_pattern") or {}
        alphas: dict[str, float] = self.config.get("alpha_pattern") or {}
        with self._refused_by_peft():
            rank = ranks.get(get_pattern_key(list(ranks), module), self.config["r"])
            return rank, alphas.get(get_pattern_key(list(alphas), module), self.config["lora_alpha"])

    def _added(self, module: str, vector: StoredTensor, scale: float) -> tuple[StoredTensor, float]:
        bias = self.base.get(f"{module}.bias")
        if bias is None or bias.shape != vector.shape:
            there = f"of shape {list(bias.shape)}" if bias else "nowhere"
            raise self._error(vector.name, f"has shape {list(vector.shape)}, but the base's bias is {there}")
        return vector, scale

    def _rows(self, module: str, values: StoredTensor) -> tuple[tuple[int, ...], StoredTensor]:
        indices = self._token_rows().get(module)
        table = self.base[f"{module}.weight"]
        if indices is None:
            raise self._error(values.name, "has no indices in trainable_token_indices")
        if values.shape != (len(indices), *table.shape[1:]) or not all(0 <= row < table.shape[0] for row in indices):
            raise self._error(values.name, f"has shape {list(values.shape)}, which is not that of rows {indices}")
        return tuple(indices), values

    def _token_rows(self) -> dict[str, list[int]]:
        """Module -> indices, from `trainable_token_indices`; a plain list means the input embeddings."""
        given = self.config.get("trainable_token_indices") or {}
        given = given if isinstance(given, dict) else {"wte": given}
        modules = {name.removesuffix(".weight") for name in self.base if name.endswith(".weight")}
        return {module: rows for name, rows in given.items() for module in modules if module.endswith(name)}

    def _targets(self) -> list[str]:
        """The base's modules on which `target_modules` puts LoRA, as PEFT finds them."""
        from peft import LoraConfig

        from finetune.model.lora_targets import is_target

        targets = self.config.get("target_modules")
        if not targets:
            return []
        keys = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        settings = {key: self.config[key] for key in keys if self.config.get(key)}
        weights = [name for name in self.base if name.endswith(".weight") and len(self.base[name].shape) >= 2]
        modules = [name.removesuffix(".weight") for name in weights]
        with self._refused_by_peft():
            config = LoraConfig(target_modules=targets, **settings)
            return [module for module in modules if is_target(config, module)]

    @contextmanager
    def _refused_by_peft(self) -> Iterator[None]:
        """Raises:
        UserError: PEFT cannot use the settings, or a name in them is not a regular expression.
        """
        try:
            yield
        except (re.error, ValueError) as error:
            raise UserError(f"{self.folder / ADAPTER_CONFIG}: its settings cannot be used: {error}") from error

    def _saved_modules(self) -> list[str]:
        return self.config.get("modules_to_save") or []

    def _trained_in_full(self, name: str) -> bool:
        bias = name.endswith(".bias") and self.config.get("bias") not in (None, "none")
        table = name in TABLES  # PEFT saves the whole table where it has LoRA or was resized
        return bias or table or any(_is_within(name, module) for module in self._saved_modules())

    def _error(self, key: str, what: str) -> UserError:
        return UserError(f"{self.folder}: {key} {what}. Nothing was written")


def _is_within(tensor: str, module: str) -> bool:
    """Whether a tensor belongs to a module that PEFT finds by the end of its name."""
    parts = tensor.split(".")
    return any(".".join(parts[:count]).endswith(module) for count in range(1, len(parts)))
