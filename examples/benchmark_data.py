"""How fast data is checked and images are decoded on this machine, and in how much memory.

    python examples/benchmark_data.py [--rows 1000000] [--processes 8] [--images 200]

Rows and images are made up and thrown away afterwards; the tokenizer is the small one of examples/tiny, unless another
checkpoint is named.
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from finetune.batches.collate import Collator
from finetune.data.checking import Rules, check_samples
from finetune.data.samples import Samples
from finetune.data.worker_processes import default_processes
from finetune.recipe import Source
from qwenvl import load_processor

WORDS = ("the", "total", "of", "this", "invoice", "is", "due", "on", "what", "says", "how", "many", "people", "are")
BATCH = 8
PHOTO = (1024, 768)  # pixels


def write_rows(folder: Path, count: int, image: str) -> Path:
    """Questions of 5 to 25 words on one image, with answers of 1 to 10."""
    draw = random.Random(0)
    file = folder / "rows.jsonl"
    with file.open("w") as lines:
        for _ in range(count):
            question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(*size))) for size in ((5, 25), (1, 10)))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": turns, "images": [image]}) + "\n")
    return file


def write_photos(folder: Path, count: int) -> Path:
    """JPEGs with some detail everywhere, and a row for each."""
    draw = np.random.default_rng(0)
    file = folder / "photos.jsonl"
    with file.open("w") as lines:
        for number in range(count):
            coarse = draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(PHOTO).save(folder / f"{number}.jpg", quality=90)
            turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Noise"}]
            lines.write(json.dumps({"messages": turns, "images": [f"{number}.jpg"]}) + "\n")
    return file


def samples_of(file: Path) -> Samples:
    return Samples([Source(path=str(file), format="messages")])


def measure_check(file: Path, model: str, processes: int, results):
    """In a process of its own, whose peak memory is then that of this check."""
    tokenizer = load_processor(model).tokenizer
    started = time.perf_counter()
    samples = samples_of(file)
    opened = time.perf_counter() - started
    started = time.perf_counter()
    checked = check_samples(samples, tokenizer, max_length=2048, processes=processes, show_progress=False)
    results.put((len(checked.kept), opened, time.perf_counter() - started, peak_memory()))


def peak_memory() -> tuple[float, float]:
    """MB that this process had at most, and the largest of its children."""
    unit = 1e6 if sys.platform == "darwin" else 1e3
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return tuple(resource.getrusage(one).ru_maxrss / unit for one in who)


def measure_images(file: Path, model: str, workers: int) -> float:
    """Images a second, decoded and resized to uint8, through the collator and as many loader workers."""
    processor, samples = load_processor(model), samples_of(file)
    collator = Collator(samples, Rules(processor.tokenizer, None, processor.n_queries), processor.image_processor)
    rows = [{"sample": index} for index in range(len(samples))]
    loader = DataLoader(rows, BATCH, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0)
    for _ in loader:  # a pass first in which workers start
        pass
    started = time.perf_counter()
    done = sum(len(batch["pixel_values"]) for batch in loader)
    return done / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--processes", type=int, default=default_processes())
    parser.add_argument("--model", default="examples/tiny", help="whose tokenizer and image size are used")
    arguments = parser.parse_args()
    counts = sorted({1, arguments.processes})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = write_photos(folder, arguments.images)
        rows = write_rows(folder, arguments.rows, "0.jpg")
        spawn = multiprocessing.get_context("spawn")
        print(f"check of {arguments.rows:,} rows")
        print("processes    opening   checking       rows/s    peak MB  largest worker MB")
        for processes in counts:
            results = spawn.Queue()
            measured = spawn.Process(target=measure_check, args=(rows, arguments.model, processes, results))
            measured.start()
            kept, opened, seconds, (own, child) = results.get()
            measured.join()
            rate = kept / seconds
            print(f"{processes:>9} {opened:>9.1f}s {seconds:>9.1f}s {rate:>12,.0f} {own:>10,.0f} {child:>18,.0f}")
        print(f"\ncollating {arguments.images:,} JPEGs of {PHOTO[0]} x {PHOTO[1]}")
        print("workers     images/s")
        for workers in sorted({0, arguments.processes}):
            print(f"{workers:>7} {measure_images(photos, arguments.model, workers):>12,.1f}")


if __name__ == "__main__":
    main()
