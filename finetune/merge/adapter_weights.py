"""A PEFT adapter read as what it does to its base: for each changed tensor of the checkpoint, how it is computed.

Nothing is guessed: a key without a place and a place without its key are refused by name, before anything is computed.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError
from finetune.merge.adapter_config import ADAPTER_CONFIG, INIT_TAKES_FROM_BASE, read_adapter_config
from qwenvl.checkpoint.checkpoint_files import StoredTensor, tensors_in

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
TABLES = ("transformer.wte.weight", "lm_head.weight")
FINITE_ROWS = 1 << 24  # values looked at at once in search of NaN


@dataclass(frozen=True)
class LowRank:
    """W + scale * B A, with DoRA each output row then scaled to its magnitude.

    Attributes:
        a: (r, in), for a convolution (r, in, height, width), for an embedding (r, rows).
        b: (out, r), for a convolution (out, r, 1, 1), for an embedding (width, r).
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
        magnitude: (out,) of DoRA.
        transposed: of an embedding, whose table is (rows, width): the change is (B A)^T.
        init: "pissa" or "olora" where W is what that initialisation left of the base.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    transposed: bool = False
    init: str | None = None


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor, in this order.

    Attributes:
        replaced: the tensor trained in full, in place of the base's.
        rows: (indices, values) of an embedding's rows trained in full.
        low_rank: LoRA on it.
        added: (vector, scale) added to a bias.
    """

    replaced: StoredTensor | None = None
    rows: tuple[tuple[int, ...], StoredTensor] | None = None
    low_rank: LowRank | None = None
    added: tuple[StoredTensor, float] | None = None


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter understood.

    Attributes:
        folder: where it is.
        config: its `adapter_config.json`.
        changes: base tensor's name -> what becomes of it.
        keys: how many tensors the adapter holds, each of which has its place in one of the changes.
        file: the adapter's weights.
    """

    folder: Path
    config: dict[str, Any]
    changes: dict[str, Change]
    keys: int
    file: Path

    def sha256(self) -> str:
        """Of config and weights: the same adapter has the same wherever it lies."""
        digest = hashlib.sha256()
        for file in (self.folder / ADAPTER_CONFIG, self.file):
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()

    def kinds(self) -> dict[str, int]:
        """How many tensors are changed in which way, for people."""
        counts: dict[str, int] = {}
        for change in self.changes.values():
            for kind, there in (
                ("LoRA", change.low_rank and change.low_rank.magnitude is None),
                ("DoRA", change.low_rank and change.low_rank.magnitude is not None),
                ("trained in full", change.replaced),
                ("rows trained in full", change.rows),
                ("bias added", change.added),
            ):
                if there:
                    counts[kind] = counts.get(kind, 0) + 1
        return counts


def read_adapter(folder: str | Path, base: Mapping[str, StoredTensor]) -> AdapterWeights:
    """Read an adapter and hold every one of its tensors against the base's.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
        base: the base's tensors by name.

    Raises:
        FileNotFoundError: no adapter in `folder`.
        UserError: it does not fit the base, is incomplete or damaged, or does something that is not understood; names
            the key.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder}: no {' or '.join(ADAPTER_WEIGHTS)} here: the adapter's weights are missing")
    stored = {tensor.name: tensor for tensor in tensors_in(file)}
    reading = _Reading(folder, config, base)
    for name, tensor in stored.items():
        reading.place(name, tensor)
    changes = reading.changes()
    reading.refuse_missing(changes)
    for tensor in stored.values():
        refuse_non_finite(tensor, f"{folder}: {tensor.name}")
    return AdapterWeights(folder, config, changes, len(stored), file)


def refuse_non_finite(tensor: StoredTensor, what: str):
    """Raises:
    UserError: NaN or an infinity in the tensor.
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
                f"{what} holds NaN or infinities: the training diverged, or the file is damaged. Take an earlier "
                "checkpoint's adapter"
            )


# Ends of an adapter's keys: what they are to the module before them.
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


class _Reading:
    """An adapter's keys finding their places."""

    def __init__(self, folder: Path, config: dict[str, Any], base: Mapping[str, StoredTensor]):
        self.folder = folder
        self.config = config
        self.base = base
        self.modules: dict[str, dict[str, StoredTensor]] = {}
        self.replaced: dict[str, StoredTensor] = {}
        self.saved_modules = tuple(config.get("modules_to_save") or ())

    def place(self, key: str, tensor: StoredTensor):
        """Put one of the adapter's tensors where it belongs."""
        name = key.removeprefix(PREFIX)
        if name == key:
            raise self._error(key, f"does not begin with {PREFIX}, as PEFT's keys do")
        end = next((end for end in PARTS if name.endswith(end)), None)
        if end is not None:
            module = name.removesuffix(end)
            if f"{module}.weight" not in self.base:
                raise self._error(key, f"has no place: the base has no {module}.weight")
            parts = self.modules.setdefault(module, {})
            if PARTS[end] in parts:
                raise self._error(key, "is there twice, in two spellings")
            parts[PARTS[end]] = tensor
            return
        # Inside a module with LoRA the base's own tensors go by base_layer.
        name = name.replace(".base_layer.", ".")
        if name not in self.base:
            raise self._error(key, f"has no place: the base has no {name}")
        if name in self.replaced:
            raise self._error(key, "is there twice, in two spellings")
        if not self._trained_in_full(name):
            raise self._error(
                key, f"is not among what {ADAPTER_CONFIG} says is trained in full (modules_to_save, bias)"
            )
        if tensor.shape != self.base[name].shape:
            raise self._error(key, f"has shape {list(tensor.shape)}, the base's has {list(self.base[name].shape)}")
        self.replaced[name] = tensor

    def changes(self) -> dict[str, Change]:
        """Base tensor's name -> what becomes of it, for all that was placed."""
        changes = {name: Change(replaced=tensor) for name, tensor in self.replaced.items()}

        def add(name: str, **what: Any):
            changes[name] = replace(changes.get(name, Change()), **what)

        for module, parts in self.modules.items():
            weight = f"{module}.weight"
            if "rows" in parts:
                add(weight, rows=self._rows(module, parts["rows"]))
            if parts.keys() - {"rows"}:
                low_rank = self._low_rank(module, parts)
                add(weight, low_rank=low_rank)
                if "b_bias" in parts:
                    add(f"{module}.bias", added=self._added(module, parts["b_bias"], low_rank.scale))
        return changes

    def refuse_missing(self, changes: Mapping[str, Change]):
        """Raises:
        UserError: something that the config says was trained has no weights in the adapter.
        """
        for module in self.saved_modules:
            expected = [name for name in self.base if _is_within(name, module)]
            missing = [name for name in expected if name not in self.replaced]
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
            missing = [name for name in self.base if name.endswith(".bias") and name not in self.replaced]
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
        # As PEFT keeps it: of a convolution with axes for what it multiplies.
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

    def _rank_and_alpha(self, module: str) -> tuple[int, float]:
        from peft.utils.other import get_pattern_key

        ranks, alphas = self.config.get("rank_pattern") or {}, self.config.get("alpha_pattern") or {}
        rank = ranks.get(get_pattern_key(ranks, module), self.config["r"])
        return rank, alphas.get(get_pattern_key(alphas, module), self.config["lora_alpha"])

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
        """Module -> indices, from `trainable_token_indices`; a plain list is of the input embeddings."""
        given = self.config.get("trainable_token_indices") or {}
        given = given if isinstance(given, dict) else {"wte": given}
        modules = {name.removesuffix(".weight") for name in self.base if name.endswith(".weight")}
        return {module: rows for name, rows in given.items() for module in modules if module.endswith(name)}

    def _targets(self) -> list[str]:
        """The base's modules on which `target_modules` puts LoRA, as PEFT finds them."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        targets = self.config.get("target_modules")
        if not targets:
            return []
        keys = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        config = LoraConfig(target_modules=targets, **{key: self.config[key] for key in keys if self.config.get(key)})
        return [
            name.removesuffix(".weight")
            for name, tensor in self.base.items()
            if name.endswith(".weight")
            and len(tensor.shape) >= 2
            # Not a truth value alone: what is excluded is told by an object of its own.
            and check_target_module_exists(config, name.removesuffix(".weight")) is True
        ]

    def _trained_in_full(self, name: str) -> bool:
        bias = name.endswith(".bias") and self.config.get("bias", "none") != "none"
        table = name in TABLES  # PEFT saves one that has LoRA, or was resized, whole
        return bias or table or any(_is_within(name, module) for module in self.saved_modules)

    def _error(self, key: str, what: str) -> UserError:
        return UserError(f"{self.folder}: {key} {what}. Nothing was written")


def _is_within(tensor: str, module: str) -> bool:
    """Whether a tensor belongs to a module that PEFT finds by the end of its name."""
    parts = tensor.split(".")
    return any(".".join(parts[:count]).endswith(module) for count in range(1, len(parts)))
