"""Measure model and image path on this machine: tokens/s and images/s, with eager attention and with SDPA.

    python examples/benchmark_model.py [--device cuda] [--dtype bfloat16] [--size published]

The mid size is a smaller model of the published architecture, with random weights; nothing is loaded or downloaded.
"""

import argparse
import io
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLImageProcessor
from qwenvl.model.configuration import PUBLISHED_VISUAL

MID_VISUAL = {**PUBLISHED_VISUAL, "heads": 8, "layers": 8, "output_dim": 1024, "width": 512, "image_start_id": 15857}
SIZES: dict[str, dict[str, Any]] = {
    "mid": {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "kv_channels": 128,
        "intermediate_size": 5504,
        "vocab_size": 16000,
        "visual": MID_VISUAL,
    },
    "published": {},
}
"""Name -> arguments of `QwenVLConfig`."""
IMAGE_SIZE = 448  # pixels; of all sizes
TEXT_TOKENS = 254


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Time of one run: the best of `repeats`, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def image_span(config: QwenVLConfig) -> tuple[list[int], int]:
    """The ids of an image, and the number of ids below it that are ordinary text."""
    start = config.image_start_id
    assert start is not None, "all sizes have a vision side"
    return [start, *[start + 2] * config.n_queries, start + 1], start - 300  # <img>, <imgpad> ..., </img>


def batch_of(config: QwenVLConfig, rows: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rows of one image and some text: 512 tokens with 256 queries."""
    span, text_ids = image_span(config)
    text = torch.randint(0, text_ids, (rows, TEXT_TOKENS))
    ids = torch.cat([torch.tensor(span).expand(rows, -1), text], dim=1).to(device)
    pixels = torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, device=device, dtype=dtype)
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids}


def measure_model(
    config: QwenVLConfig, attention: str, device: str, dtype: torch.dtype, rows: int, repeats: int
) -> None:
    """Print the rates of forward, backward, generation and image encoding."""
    torch.manual_seed(0)
    with torch.device(device):
        model = QwenVLForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=dtype)
    batch = batch_of(config, rows, device, dtype)
    tokens = batch["input_ids"].numel()

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    def encode() -> None:
        with torch.no_grad():
            model.get_image_features(batch["pixel_values"])

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    def decode() -> None:
        model.generate(
            **{name: value for name, value in batch.items() if name != "labels"},
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
        )

    rates = {
        "forward": tokens / seconds(forward, device, repeats),
        "forward + backward": tokens / seconds(forward_backward, device, repeats),
        "generate 32 each": rows * 32 / seconds(decode, device, 1),
        "encode images": rows / seconds(encode, device, repeats),
    }
    for what, rate in rates.items():
        unit = "images/s" if what == "encode images" else "tokens/s"
        print(f"  {attention:6s} {what:20s} {rate:10.1f} {unit}")


def measure_images() -> None:
    """Print the rate of the image path on one core: JPEG bytes to uint8 pixels of 448 x 448."""
    processor = QwenVLImageProcessor(IMAGE_SIZE)
    noise = np.random.default_rng(0)
    for width, height in ((640, 480), (1280, 960), (3000, 2000)):
        coarse = Image.fromarray(noise.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((width, height)).save(file, "JPEG", quality=85)
        data = file.getvalue()
        rate = 1 / seconds(partial(processor.preprocess, data, do_normalize=False, return_tensors="pt"), "cpu", 10)
        print(f"  {width} x {height} JPEG {rate:10.1f} images/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rows", type=int, default=2, help="rows of one image and 254 text tokens (512 in all)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    config = QwenVLConfig(**SIZES[arguments.size])
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{arguments.size} size, {arguments.dtype}, {arguments.rows} rows, on {where}, torch {torch.__version__}")
    for attention in ("eager", "sdpa"):
        measure_model(
            config,
            attention,
            arguments.device,
            getattr(torch, arguments.dtype),
            arguments.rows,
            arguments.repeats,
        )
    print("image path, one process")
    measure_images()


if __name__ == "__main__":
    main()
