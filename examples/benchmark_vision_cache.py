"""Measure what the vision cache saves on this machine: a training step with pixels, and with cached features.

    python examples/benchmark_vision_cache.py [--device cuda] [--dtype bfloat16] [--size mid] [--steps 3]

A smaller model of the published architecture, with random weights and LoRA on its language model. Each step packs
samples of one page and some text. Pages are JPEGs that are decoded in the step, as in a run with `data.workers: 0`; or
their features are read from the cache that the encoding phase has filled, in a temporary folder.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from benchmark_evaluation import SMALL
from benchmark_model import IMAGE_SIZE, SIZES
from huggingface_hub import constants
from peft import PeftModel
from PIL import Image

from finetune.batches.collate import Collator
from finetune.batches.images import image_arguments
from finetune.data.checks.checking import look_at
from finetune.data.checks.rules import Rules
from finetune.data.samples import Samples
from finetune.model.adapters import put_lora
from finetune.quantities import format_bytes
from finetune.recipe.sections import Adapter, Data, Freeze
from finetune.recipe.sources import Source
from finetune.terminal import say_nothing
from finetune.vision_cache.cache import VisionCache
from finetune.vision_cache.encoding import encode_images
from finetune.vision_cache.phase import remove_vision_tower
from finetune.vision_cache.run_images import RunImages, SampleImages
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLImageProcessor, load_processor
from qwenvl.model.configuration import PUBLISHED_VISUAL
from qwenvl.text.chat import IGNORED

PAGE = (1240, 1754)  # pixels: A4 at 150 dots an inch
BATCH = 4
CONFIGS = {**SIZES, "small": SMALL}


def write_pages(folder: Path, count: int) -> Path:
    """Write JPEGs with detail everywhere, and a row for each."""
    draw, file = np.random.default_rng(0), folder / "rows.jsonl"
    with file.open("w") as lines:
        for number in range(count):
            coarse = draw.integers(0, 256, (155, 219, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(PAGE).save(folder / f"{number}.jpg", quality=85)
            answer = "The total of this invoice is due within thirty days of the date above. " * 3
            turns = [{"role": "user", "content": "What does it say?"}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": turns, "images": [f"{number}.jpg"]}) + "\n")
    return file


def step(model: PeftModel, collator: Collator, rows: list[int]) -> None:
    """Collate, forward, backward."""
    batch = {name: tensor.to(model.device) for name, tensor in collator([{"sample": row} for row in rows]).items()}
    base = model.get_base_model()
    assert isinstance(base, QwenVLForConditionalGeneration)
    images = image_arguments(base, batch)
    predicting = (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
    output = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        logits_to_keep=predicting,
        use_cache=False,
        **images,
    )
    torch.nn.functional.cross_entropy(output.logits[0].float(), batch["labels"][0, predicting + 1]).backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[list[int]], None], steps: int) -> float:
    """Average seconds of a step, after a warm-up."""
    run(list(range(BATCH)))
    started = time.perf_counter()
    for number in range(steps):
        run(list(range(number * BATCH, (number + 1) * BATCH)))
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CONFIGS, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tiny = load_processor(Path(__file__).parent / "tiny")
    settings = CONFIGS[arguments.size]
    visual = {**settings.get("visual", PUBLISHED_VISUAL), "image_start_id": tiny.tokenizer.image_start_id}
    config = QwenVLConfig(**{**settings, "visual": visual})
    with torch.device(arguments.device):
        base = QwenVLForConditionalGeneration._from_config(config, dtype=getattr(torch, arguments.dtype))
    model = put_lora(base, Adapter(r=16), Freeze(), embeddings=False).train()
    millions = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in (("vision", base.transformer.visual), ("language", base.transformer.h))
    }
    image_processor = QwenVLImageProcessor(IMAGE_SIZE)

    with tempfile.TemporaryDirectory() as folder:
        constants.HF_HOME = folder
        images = arguments.steps * BATCH
        samples = Samples([Source(path=str(write_pages(Path(folder), images)), format="messages")])

        def collator(cache: VisionCache | None) -> Collator:
            return Collator(samples, Rules(tiny.tokenizer, None, tiny.n_queries), image_processor, cache)

        where = (
            torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        )
        print(
            f"{arguments.size} size, {millions['vision']:.0f} M parameters of vision, {millions['language']:.0f} M of "
            f"language blocks, {arguments.dtype}, on {where}"
        )
        print(f"{BATCH} samples a step, pages of {PAGE[0]} x {PAGE[1]}")
        without = seconds(lambda rows: step(model, collator(None), rows), arguments.steps)
        rules = Rules(tiny.tokenizer, None, tiny.n_queries)
        shown = SampleImages(samples, look_at(samples, rules, show_progress=False), rules, range(len(samples)))
        data = Data(train=(Source(path="-", format="messages"),), vision_cache="disk", workers=0)
        started = time.perf_counter()
        cache = encode_images(base, RunImages([shown]), image_processor, data, say_nothing)
        encoding = time.perf_counter() - started
        freed = sum(tensor.nbytes for tensor in base.transformer.visual.state_dict().values())
        remove_vision_tower(base)
        cached = seconds(lambda rows: step(model, collator(cache), rows), arguments.steps)
    size = format_bytes(cache.store.record.nbytes)
    print(f"  with pixels     {without:8.3f} s a step")
    print(
        f"  with the cache  {cached:8.3f} s a step, {without / cached:.1f} times as fast; {format_bytes(freed)} freed"
    )
    print(f"  encoding        {encoding:8.3f} s for {images} images of {size}, {images / encoding:.1f} images/s")


if __name__ == "__main__":
    main()
