"""Does a merged checkpoint compute what its base with the adapter computes?

The merged folder is loaded in a process of its own, as its users will: `python -m finetune.merge.check FOLDER FILE`
writes the logits of a sample prompt. The base with the adapter gets the same prompt in this process. Only one of the
two models is in memory at a time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BatchFeature

from finetune.errors import Failed, InputError, UserError
from finetune.files.tensor_files import file_hash
from finetune.merge.sources import Sources
from finetune.merge.tensors import PIECE_VALUES, MergedTensor
from finetune.quantities import format_bytes
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLTokenizer, load_model, load_processor
from qwenvl.checkpoint.gptq import DequantizedTensor
from qwenvl.text.chat import DEFAULT_SYSTEM

if TYPE_CHECKING:
    from peft import PeftModel

QUESTION = "What is written in the image, and where? Count the shapes: 1, 2, 3."
ANSWER = "A sign: <ref>the red sign</ref><box>(120,80),(560,430)</box>, and two circles of 1,234.50 mm."
POSITIONS = 32  # at the prompt's end; each depends on all before it
SAMPLED = 12  # tensors of which every value is computed once more
MEASURED = 8  # layers on which the rounding to 4 bits is measured

# Largest relative difference (Frobenius) of the logits. In float32 only the order of sums differs. In 16 bits, weights
# and activations are rounded at different places, which grows with the root of the depth (bfloat16: 1.4% measured on
# 2 + 2 layers of the published width): the comparison finds only gross faults there. That each weight was rounded just
# once is what `check_rounding` tests.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.15}

# Memory to load and run a model, for each byte of its weights; and in bytes at most where the weights keep their
# stored type, and stay memory-mapped in their files.
MEMORY_PER_BYTE = 1.3
MEMORY_MAPPED = 3_000_000_000


def check_merge(
    folder: Path,
    plan: Sequence[MergedTensor],
    sources: Sources,
    hashes: Mapping[str, str],
    onto: str,
    prompt: dict[str, torch.Tensor],
) -> dict[str, str]:
    """Read back what was written, compute some of it once more, and compare the logits with base and adapter.

    Args:
        folder: the merged checkpoint, complete.
        plan: its tensors.
        sources: what it was made from.
        hashes: SHA-256 of the weight files, taken while writing.
        onto: "base", or "dequantized" where it must equal the 4-bit model that was trained.
        prompt: the base's `sample_prompt`.

    Returns:
        What was found, by name, to be shown.

    Raises:
        Failed: something is not as it should be.
    """
    for name, expected in hashes.items():
        if file_hash(folder / name) != expected:
            raise Failed(f"{name} reads back as something else than was written: is the disk sound? Nothing was kept")
    recomputed = check_rounding(folder, plan)
    facts = {"read back": f"{len(hashes)} weight files hold what was written; {recomputed} tensors computed once more"}
    dtype = max(plan, key=lambda tensor: tensor.planned.nbytes).dtype
    needed = int(sum(tensor.planned.nbytes for tensor in plan) * MEMORY_PER_BYTE)
    packed = any(isinstance(tensor.base, DequantizedTensor) for tensor in plan)
    if not sources.parts and not packed and all(tensor.dtype == tensor.base.dtype for tensor in plan):
        needed = min(needed, MEMORY_MAPPED)
    available = psutil.virtual_memory().available
    if available < needed:
        facts["logits"] = (
            f"not compared: that takes about {format_bytes(needed)} of memory, and {format_bytes(available)} are free"
        )
        return facts
    quantized = onto == "dequantized"
    changed_base = any(tensor.change and tensor.change.low_rank and tensor.change.low_rank.init for tensor in plan)
    seen_in = [tensor.seen_in for tensor in plan if tensor.quantized or (changed_base and tensor.change)]
    tolerance = max(TOLERANCES.get(kind, TOLERANCES[torch.float32]) for kind in (dtype, *seen_in))
    adapted = _answer_adapted(sources, seen_in[0] if quantized else dtype, quantized, prompt)
    ids, merged = answer_in_fresh_process(folder)
    if not torch.equal(ids, prompt["input_ids"]):
        raise Failed("the merged folder's tokenizer gives other ids than the base's. Nothing was kept")
    compared = compare_logits(merged, adapted, tolerance)
    what = "the 4-bit model with the adapter" if quantized else "base with adapter"
    facts["logits"] = f"{compared.from_model(what)} (allowed: {tolerance:g})"
    if sources.parts and not quantized:
        trained = _answer_adapted(sources, sources.trained_in or dtype, True, prompt)
        compared = compare_logits(merged, trained, None)
        facts["against 4 bits"] = f"logits {compared.from_model('the 4-bit model that was trained')}"
    return facts


def measure_rounding_to_4bit(
    plan: Sequence[MergedTensor], config: QwenVLConfig, parts: Sequence[str]
) -> dict[str, str]:
    """How far the base's weights are from what a training in 4 bits saw of them, on some of the layers.

    Args:
        plan: tensors of the merged checkpoint.
        config: of the base.
        parts: of the base that were in 4 bits (see `qwenvl.model.quantization.PARTS`).
    """
    from qwenvl.model.nf4_weights import dequantized
    from qwenvl.model.quantization import quantized_names

    names = quantized_names(config, parts)
    quantized = [tensor for tensor in plan if tensor.base.name in names]
    # All except the head, whose float32 copy alone would take 2.5 GB.
    measured = _spread([tensor for tensor in quantized if prod(tensor.base.shape) <= PIECE_VALUES], MEASURED)
    difference = size = 0.0
    for tensor in measured:
        weight = tensor.base.read().float()
        difference += float((dequantized(weight, tensor.seen_in).float() - weight).square().sum())
        size += float(weight.square().sum())
    relative = (difference / size) ** 0.5
    layers = f"{len(measured)} of {len(quantized)} layers measured"
    return {"4-bit base": f"its weights are {relative:.2%} away from the base's (Frobenius; {layers})"}


def prompt_of_base(base: str, *, visual: bool) -> dict[str, torch.Tensor]:
    """The sample prompt by the base's own tokenizer and image processor.

    Raises:
        UserError: their files are missing or damaged.
    """
    try:
        return sample_prompt(base, visual=visual)
    except InputError as error:
        raise UserError(
            f"{base}: its tokenizer or image processor cannot be used, so that the merged model could not be checked "
            f"({error}). Restore its files, or leave the check out with --no-check"
        ) from error


def _answer_adapted(
    sources: Sources, dtype: torch.dtype, quantized: bool, prompt: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The logits of base and adapter, (POSITIONS, vocabulary); the model is freed afterwards."""
    try:
        model = load_model(
            sources.base,
            adapter=sources.adapter,
            dtype=dtype,
            quantization="nf4" if quantized else "none",
            quantize=sources.parts if quantized else None,
        )
    except InputError as error:
        raise Failed(
            f"base and adapter cannot be loaded to compare with (--no-check leaves it out): {error}"
        ) from error
    return answer(model, prompt)


@dataclass(frozen=True)
class Compared:
    """Two models' logits of the sample prompt.

    Attributes:
        relative: ||merged - adapted|| / ||adapted||, Frobenius.
        largest: of the absolute differences.
    """

    relative: float
    largest: float

    def from_model(self, what: str) -> str:
        """The relative difference comes last, where a caller may add what is allowed."""
        return f"no logit more than {self.largest:.1e}, all {self.relative:.1e} of their size, from {what}"


def sample_prompt(path: str | Path, *, visual: bool) -> dict[str, torch.Tensor]:
    """A conversation about an image that is drawn here, encoded by the folder's own processor.

    Returns:
        `input_ids` and `attention_mask` (1, length); with `visual` also `pixel_values` (1, 3, S, S).
    """
    if not visual:
        ids = torch.tensor([QwenVLTokenizer.from_pretrained(path).encode(f"{QUESTION} {ANSWER}")])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    image = Image.linear_gradient("L").resize((400, 300)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.rectangle((40, 30, 200, 130), fill="red")
    draw.ellipse((220, 100, 330, 210), fill="blue")
    draw.text((60, 70), "SIGN 42", fill="white")
    # The same for base and merged model, whatever system message and views the latter was trained with.
    system = {"role": "system", "content": DEFAULT_SYSTEM}
    question = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}
    messages = [system, question, {"role": "assistant", "content": ANSWER}]
    processor = load_processor(path)
    processor.views = None
    encoded = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert isinstance(encoded, BatchFeature), "return_dict=True"
    return dict(encoded)


@torch.inference_mode()
def answer(model: "QwenVLForConditionalGeneration | PeftModel", prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the prompt's last positions: (POSITIONS, vocabulary), float32."""
    prompt = {name: value.to(model.device) for name, value in prompt.items()}
    return model(**prompt, logits_to_keep=POSITIONS, use_cache=False).logits[0].float().cpu()


def answer_in_fresh_process(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Load a folder in a process of its own, offline, and run the sample prompt.

    Returns:
        The prompt's ids (1, length) and the logits (POSITIONS, vocabulary).

    Raises:
        Failed: it cannot be loaded or run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "logits.safetensors"
        done = subprocess.run(
            [sys.executable, "-m", "finetune.merge.check", str(folder.absolute()), str(file)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise Failed(f"the merged checkpoint cannot be used: {last}")
        read = load_file(file)
    return read["input_ids"], read["logits"]


def compare_logits(merged: torch.Tensor, adapted: torch.Tensor, tolerance: float | None) -> Compared:
    """Compare the merged model's logits with those of base and adapter.

    Raises:
        Failed: they differ by more than the tolerance (None: any difference is fine), or are not finite.
    """
    merged, adapted = merged.double(), adapted.double()
    relative = float((merged - adapted).norm() / adapted.norm())
    largest = float((merged - adapted).abs().max())
    if tolerance is not None and not relative <= tolerance:
        raise Failed(
            f"the merged model does not answer as base and adapter do: logits differ by {relative:.2g} of their size "
            f"(allowed: {tolerance:g}). Nothing was kept"
        )
    return Compared(relative, largest)


def check_rounding(folder: Path, plan: Sequence[MergedTensor]) -> int:
    """Read some of the written tensors back and compute them once more: every bit must agree.

    Returns:
        How many were looked at.

    Raises:
        Failed: one differs; names it.
    """
    changed = [tensor for tensor in plan if tensor.change is not None]
    unchanged = [tensor for tensor in plan if tensor.change is None]
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    looked_at = [*_spread(changed, SAMPLED), *_spread(unchanged, SAMPLED // 3)]
    for tensor in looked_at:
        name = tensor.base.name
        with safe_open(files[name], framework="pt") as opened:
            written = opened.get_slice(name)
            start = 0
            for piece in tensor.pieces():
                there = written[start : start + len(piece)] if piece.ndim else opened.get_tensor(name)
                start += len(piece) if piece.ndim else 0
                if there.dtype != piece.dtype or not torch.equal(there, piece):
                    raise Failed(f"{name} was not written as it was computed: is the disk sound? Nothing was kept")
    return len(looked_at)


def _spread(tensors: Sequence[MergedTensor], count: int) -> list[MergedTensor]:
    """Up to `count` of them, evenly from first to last."""
    if len(tensors) <= count:
        return list(tensors)
    return [tensors[number * (len(tensors) - 1) // (count - 1)] for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("file", type=Path, help="safetensors file to write: input_ids, logits")
    arguments = parser.parse_args()
    model = load_model(arguments.folder)
    prompt = sample_prompt(arguments.folder, visual=model.config.visual is not None)
    save_file({"input_ids": prompt["input_ids"], "logits": answer(model, prompt)}, arguments.file)


if __name__ == "__main__":
    main()
