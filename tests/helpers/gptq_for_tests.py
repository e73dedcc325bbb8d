"""Checkpoints packed by GPTQ, made from the tiny one: codes, zero points and scales chosen here, packed bit by bit.

The packing is written from the format's description with Python's integers, one code after the other, and shares
nothing with the reader.
"""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny"
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
GROUP_SIZE = 64  # the published 128 would leave one or two groups in the tiny widths


@dataclass(frozen=True)
class Quantized:
    """A quantised linear, unpacked.

    Attributes:
        codes: (in, out), 0 to 15.
        zeros: (groups, out), 0 to 15 in "gptq_v2", 1 to 15 in "gptq".
        scales: (groups, out) float16.
        groups: (in,), the group of each input.
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor

    def weight(self) -> torch.Tensor:
        """(out, in) float16, by the format's formula in float64, rounded once."""
        above_zero = self.codes.double() - self.zeros.double()[self.groups]
        return (self.scales.double()[self.groups] * above_zero).T.half()

    def tensors(self, module: str, *, v2: bool = False) -> dict[str, torch.Tensor]:
        """As a checkpoint stores it."""
        return {
            f"{module}.qweight": _words(self.codes.T).T,
            f"{module}.qzeros": _words(self.zeros - (0 if v2 else 1)),
            f"{module}.scales": self.scales,
            f"{module}.g_idx": self.groups.to(torch.int32),
        }


def random_linear(
    inputs: int, outputs: int, group_size: int, seed: int, *, act_order: bool = False, zeros_from: int = 1
) -> Quantized:
    """Every code and zero point in it is as likely as any other."""
    draw = torch.Generator().manual_seed(seed)
    groups = torch.arange(inputs) // group_size
    count = int(groups[-1]) + 1
    if act_order:
        groups = groups[torch.randperm(inputs, generator=draw)]
    return Quantized(
        torch.randint(0, 16, (inputs, outputs), generator=draw),
        torch.randint(zeros_from, 16, (count, outputs), generator=draw),
        (torch.rand(count, outputs, generator=draw) * 0.01 + 0.001).half(),
        groups,
    )


def rounded_linear(weight: torch.Tensor, group_size: int) -> Quantized:
    """A weight (out, in) rounded to the nearest of 16 levels, symmetric about zero point 8, as `sym: true` is."""
    groups = torch.arange(weight.shape[1]) // group_size
    blocks = weight.float().view(weight.shape[0], -1, group_size)
    scales = (blocks.abs().amax(2) / 7.5).half()
    codes = (blocks / scales.float()[..., None]).round().add(8).clamp(0, 15).long().view(weight.shape)
    return Quantized(codes.T, torch.full_like(scales.T, 8, dtype=torch.long), scales.T.contiguous(), groups)


def write_int4(folder: Path, *, group_size: int = GROUP_SIZE, v2: bool = False, **settings: Any) -> Path:
    """The tiny checkpoint in the layout of Qwen-VL-Chat-Int4: the language model's linears in 4 bits, with a bias
    each, the rest in float16. In `folder`/int4.

    Args:
        settings: further keys of the `quantization_config`; None leaves one out.
    """
    int4 = folder / "int4"
    shutil.copytree(TINY, int4)
    save(_packed(group_size, v2), int4)
    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
        "damp_percent": 0.01,
        "model_file_base_name": "model",
    }
    quantization |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    quantization = {key: value for key, value in (quantization | settings).items() if value is not None}
    change_config(int4, quantization_config=quantization, torch_dtype="float16", fp16=True, fp32=False)
    return int4


def write_unpacked(folder: Path, *, group_size: int = GROUP_SIZE) -> Path:
    """The same model as `write_int4` writes, as an ordinary float16 checkpoint. In `folder`/float16."""
    plain = folder / "float16"
    shutil.copytree(TINY, plain)
    tensors = {name: tensor.half() for name, tensor in load_file(TINY / "model.safetensors").items()}
    for module in _modules():
        tensors[f"{module}.weight"] = rounded_linear(tensors[f"{module}.weight"], group_size).weight()
    save(tensors, plain)
    change_config(plain, torch_dtype="float16", fp16=True, fp32=False)
    return plain


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of `h.0.mlp.w1` by the end of their names, such as `scales`; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for kind, value in changes.items():
        name = f"transformer.h.0.mlp.w1.{kind}"
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save(tensors, folder)


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of a `config.json`; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


@cache
def _packed(group_size: int, v2: bool) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.half() for name, tensor in load_file(TINY / "model.safetensors").items()}
    for module in _modules():
        quantized = rounded_linear(tensors.pop(f"{module}.weight"), group_size)
        tensors |= quantized.tensors(module, v2=v2)
        tensors.setdefault(f"{module}.bias", torch.zeros(quantized.codes.shape[1], dtype=torch.float16))
    return tensors


def _modules() -> list[str]:
    return [f"transformer.h.{layer}.{linear}" for layer in range(2) for linear in LINEARS]


def _words(values: torch.Tensor) -> torch.Tensor:
    """(rows, columns) of 0 to 15 -> (rows, columns / 8) int32: the first value of eight in the lowest four bits."""
    rows = []
    for row in values.tolist():
        assert len(row) % 8 == 0 and all(0 <= value < 16 for value in row)
        words = [
            sum(value << 4 * place for place, value in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)
        ]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)
