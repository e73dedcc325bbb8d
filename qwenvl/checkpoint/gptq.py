"""GPTQ checkpoints, such as Qwen-VL-Chat-Int4: weights packed in 4 bits, read as the 16-bit weights they stand for.

In place of a linear's `weight` (out, in) such a checkpoint has, as AutoGPTQ and GPTQModel write it (little-endian):

- `qweight` (in / 8, out) int32: 4-bit codes, eight inputs in a word, the first in its lowest bits.
- `qzeros` (groups, out / 8) int32: 4-bit zero points, eight outputs in a word, the first in its lowest bits. The
  format "gptq" stores them minus one, "gptq_v2" as they are.
- `scales` (groups, out), in 16 bits.
- `g_idx` (in,) int32: the group of each input. Without act-order (`desc_act`) it is input // group_size.

    weight[output, input] = scales[group, output] * (code[input, output] - zero[group, output])

Codes and zero points are small integers: the product is exact in float32, which PyTorch computes it in, and rounded
once, to the type of the scales. These are the values that GPTQ's 16-bit kernels compute with. A weight in another type
is one of these rounded, whether the packed checkpoint is loaded in that type or one that was exported from it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qwenvl.checkpoint.stored_tensor import StoredTensor
from qwenvl.errors import InputError

METHOD = "gptq"
CODES, ZEROS, SCALES, GROUPS = "qweight", "qzeros", "scales", "g_idx"
BITS = 4
IN_A_WORD = 32 // BITS

# What is added to a stored zero point, by the name of the format. AutoGPTQ's older checkpoints do not name theirs.
ADDED_TO_ZEROS = {None: 1, "gptq": 1, "gptq_v2": 0}

# Keys that other programs write, and the values that mean what is read here.
KNOWN = {"pack_dtype": (None, "int32"), "is_marlin_format": (None, False), "dynamic": (None, {}), "rotation": (None,)}

# AutoGPTQ gave every linear a bias. Of these the model has none.
WITHOUT_BIAS = ("attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj", "lm_head")

CHUNK = 1 << 22  # values computed at once: temporary memory is about ten bytes for each

INSTEAD = "give the 16-bit checkpoint that it was made from"


@dataclass(frozen=True)
class GPTQSettings:
    """How a checkpoint was quantised.

    Attributes:
        group_size: inputs that share a scale; -1 for all of them.
        act_order: groups may be of any inputs (`desc_act`), as `g_idx` says.
        added_to_zeros: 1 where zero points are stored minus one.
    """

    group_size: int
    act_order: bool
    added_to_zeros: int


def is_gptq(quantization: Any) -> bool:
    """Whether a `quantization_config` of a config.json names GPTQ."""
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD


def read_settings(quantization: Mapping[str, Any], where: str) -> GPTQSettings:
    """Read a `quantization_config`, or the `quantize_config.json` of a folder that AutoGPTQ wrote.

    Args:
        where: the file it is in, for messages.

    Raises:
        InputError: another method, another number of bits, or another format than those above.
    """
    method = quantization.get("quant_method", METHOD)
    if method != METHOD:
        raise InputError(f"{where}: the weights are quantised by {method!r}, which cannot be read: {INSTEAD}")
    bits = quantization.get("bits")
    if bits != BITS:
        raise InputError(f"{where}: GPTQ with bits: {bits!r}, but only GPTQ of {BITS} bits can be read: {INSTEAD}")
    group_size = quantization.get("group_size")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or not (group_size == -1 or group_size > 0):
        raise InputError(f"{where}: group_size must be a positive whole number, or -1, not {group_size!r}: restore it")
    act_order = quantization.get("desc_act", False)
    if not isinstance(act_order, bool):
        raise InputError(f"{where}: desc_act must be true or false, not {act_order!r}: restore it")
    for key in ("checkpoint_format", "format"):
        if quantization.get(key) not in ADDED_TO_ZEROS:
            names = ", ".join(name for name in ADDED_TO_ZEROS if name)
            raise InputError(f"{where}: {key} is {quantization[key]!r}, and {names} can be read: {INSTEAD}")
    for key, known in KNOWN.items():
        if quantization.get(key) not in known:
            raise InputError(f"{where}: GPTQ with {key}: {quantization[key]!r} cannot be read: {INSTEAD}")
    form = quantization.get("checkpoint_format") or quantization.get("format")
    return GPTQSettings(group_size, act_order, ADDED_TO_ZEROS[form])


def has_codes(names: Iterable[str]) -> bool:
    """Whether tensors of these names are packed by GPTQ (or AWQ, which uses the same names)."""
    return any(name.endswith(f".{CODES}") for name in names)


@dataclass(frozen=True)
class DequantizedTensor(StoredTensor):
    """A weight (out, in) that is stored as GPTQ's codes, and computed when it is read.

    Reading some of its rows takes all of its codes (half a byte a value) beside what is read.
    """

    codes: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    groups: StoredTensor | None
    settings: GPTQSettings

    def read(self, start: int = 0, stop: int | None = None, into: torch.Tensor | None = None) -> torch.Tensor:
        """As the base class.

        Raises:
            InputError: as the base class; or `g_idx` or `qzeros` hold what no GPTQ checkpoint does.
        """
        rows, width = self.shape
        stop = max(min(rows if stop is None else stop, rows), start)
        size = (stop - start) * width * self.dtype.itemsize
        memory = torch.empty(size, dtype=torch.uint8) if into is None else into[:size]
        weight = memory.view(self.dtype).view(stop - start, width)
        columns, step = self._columns(0, width), max(1, CHUNK // width)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            columns.rows(first, last, out=weight[first - start : last - start])
        return weight

    def flat(
        self, start: int, stop: int, into: torch.Tensor | None = None, *, page_cache: bool = False
    ) -> torch.Tensor:
        """As the base class, but computed: not in `into`. Values of one row take only their own codes."""
        rows, width = self.shape
        stop = min(stop, rows * width)
        if start >= stop:
            return torch.empty(0, dtype=self.dtype)
        first, last = start // width, (stop - 1) // width
        start, stop = start - first * width, stop - first * width
        if first != last:
            return self.read(first, last + 1).view(-1)[start:stop]
        values = torch.empty(1, stop - start, dtype=self.dtype)
        self._columns(start, stop).rows(first, first + 1, out=values)
        return values.view(-1)

    def _columns(self, start: int, stop: int) -> "_Columns":
        """What the weights of inputs `start` to before `stop` are computed from."""
        groups = self._group_of_inputs(start, stop)
        first, last = int(groups.min()), int(groups.max()) + 1
        zeros = _unpacked(self.zeros.read(first, last))
        added = self.settings.added_to_zeros
        if added and (zeros == 2**BITS - 1).any():
            raise InputError(
                f"{self.file}: {self.zeros.name} holds a zero point of {2**BITS - 1} + 1, which programs read in "
                f"different ways: {INSTEAD}"
            )
        word = start // IN_A_WORD
        return _Columns(
            self.codes.read(word, -(-stop // IN_A_WORD)),
            range(start - word * IN_A_WORD, stop - word * IN_A_WORD),
            zeros + added,
            self.scales.read(first, last),
            groups - first,
        )

    def _group_of_inputs(self, start: int, stop: int) -> torch.Tensor:
        size = self.shape[1] if self.settings.group_size == -1 else self.settings.group_size
        in_order = torch.arange(start, stop) // size
        if self.groups is None:
            return in_order
        groups = self.groups.read(start, stop).long()
        if int(groups.min()) < 0 or int(groups.max()) >= self.scales.shape[0]:
            raise InputError(
                f"{self.file}: {self.groups.name} names groups other than the {self.scales.shape[0]} of its scales: "
                "it is damaged, fetch it again"
            )
        if not self.settings.act_order and not torch.equal(groups, in_order):
            raise InputError(
                f"{self.file}: {self.groups.name} does not have the inputs in groups of {size}, although desc_act is "
                "false: config and weights do not belong together"
            )
        return groups


@dataclass(frozen=True)
class _Columns:
    """Some inputs of a packed weight, all outputs.

    Attributes:
        codes: (words, out) int32, the words with these inputs.
        inputs: those wanted of the inputs in these words.
        zeros: (groups, out) uint8.
        scales: (groups, out).
        groups: (inputs,) int64, rows of `zeros` and `scales`.
    """

    codes: torch.Tensor
    inputs: range
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor

    @cached_property
    def whole(self) -> bool:
        """Whether the inputs are in groups of one size, one after the other: no input needs its group looked up."""
        size, rest = divmod(len(self.groups), len(self.zeros))
        return not rest and torch.equal(self.groups, torch.arange(len(self.groups)) // size)

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Compute the weight of outputs `start` to before `stop`.

        Args:
            out: (stop - start, inputs) of the type of the scales, contiguous.
        """
        codes = _unpacked(self.codes[:, start:stop].T)[:, self.inputs.start : self.inputs.stop].view(torch.int8)
        zeros, scales = self.zeros[:, start:stop].T.view(torch.int8), self.scales[:, start:stop].T
        if self.whole:
            codes, out = (each.view(*zeros.shape, -1) for each in (codes, out))
            zeros, scales = zeros.unsqueeze(2), scales.unsqueeze(2)
        else:
            zeros, scales = zeros.index_select(1, self.groups), scales.index_select(1, self.groups)
        torch.mul(codes - zeros, scales, out=out)


def dequantized(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], where: str
) -> dict[str, StoredTensor]:
    """The tensors of a GPTQ checkpoint with each linear's codes, zero points, scales and groups as one weight.

    Args:
        tensors: as stored, by name.
        quantization: the config's `quantization_config`.
        where: the file of that, for messages.

    Raises:
        InputError: settings that cannot be read (see `read_settings`), or tensors that are missing, or of other
            shapes or types than the format has.
    """
    settings = read_settings(quantization, where)
    parts = {CODES, ZEROS, SCALES, GROUPS}
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == CODES:
            found[f"{module}.weight"] = _weight(module, tensors, settings)
        elif kind in parts:
            if f"{module}.{CODES}" not in tensors:
                raise InputError(f"{tensor.file}: there is a {name}, but no {module}.{CODES}: fetch the weights again")
        elif not (kind == "bias" and f"{module}.{CODES}" in tensors and module.endswith(WITHOUT_BIAS)):
            found[name] = tensor
        elif tensor.read().any():
            raise InputError(f"{tensor.file}: {name} is not zero, and Qwen has no bias there: these are other weights")
    return found


def _weight(module: str, tensors: Mapping[str, StoredTensor], settings: GPTQSettings) -> DequantizedTensor:
    codes = tensors[f"{module}.{CODES}"]
    if f"{module}.weight" in tensors:
        raise InputError(f"{codes.file}: both {module}.weight and {codes.name} are here: which one is meant?")
    for kind in (ZEROS, SCALES):
        if f"{module}.{kind}" not in tensors:
            raise InputError(f"{codes.file}: {module}.{kind} is missing beside {codes.name}: fetch the weights again")
    zeros, scales = tensors[f"{module}.{ZEROS}"], tensors[f"{module}.{SCALES}"]
    groups = tensors.get(f"{module}.{GROUPS}")
    if groups is None and settings.act_order:
        raise InputError(f"{codes.file}: {module}.{GROUPS} is missing, which act-order needs: fetch the weights again")
    _require(codes, 2, (torch.int32,))
    inputs, outputs = codes.shape[0] * IN_A_WORD, codes.shape[1]
    in_groups = 1 if settings.group_size == -1 else -(-inputs // settings.group_size)
    _require(zeros, (in_groups, -(-outputs // IN_A_WORD)), (torch.int32,))
    _require(scales, (in_groups, outputs), (torch.float16, torch.bfloat16, torch.float32))
    if groups is not None:
        _require(groups, (inputs,), (torch.int32, torch.int64))
    return DequantizedTensor(
        name=f"{module}.weight",
        file=codes.file,
        offset=codes.offset,
        dtype=scales.dtype,
        shape=(outputs, inputs),
        stride=(inputs, 1),
        codes=codes,
        zeros=zeros,
        scales=scales,
        groups=groups,
        settings=settings,
    )


def _require(tensor: StoredTensor, shape: tuple[int, ...] | int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check a tensor's type, and its shape or number of dimensions."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{tensor.file}: {tensor.name} is of type {tensor.dtype}, where GPTQ has {names}")
    if tensor.shape != shape and len(tensor.shape) != shape:
        wanted = f"{shape} dimensions" if isinstance(shape, int) else f"{shape}"
        raise InputError(
            f"{tensor.file}: {tensor.name} has shape {tensor.shape}, where GPTQ of this group_size has {wanted}: "
            "config and weights do not belong together, fetch them again"
        )


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """(rows, columns) int32 -> (rows, columns * IN_A_WORD) uint8, the lowest bits first."""
    # Not `contiguous()`, which leaves a single column with any stride.
    pairs = words.clone(memory_format=torch.contiguous_format).view(torch.uint8).to(torch.int16)
    # The first code of a byte in the low byte of 16 bits, the second in the high one.
    return (pairs << BITS | pairs).bitwise_and_(0x0F0F).view(torch.uint8)
