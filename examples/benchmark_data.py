"""Measure how fast data is checked and images are decoded on this machine, and the memory that checking takes.

    python examples/benchmark_data.py [--rows 1000000] [--processes 8] [--images 200]

Rows and images are synthetic and temporary. The tokenizer is the small one of examples/tiny, unless another checkpoint
is named.
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from finetune.batches.collate import Collator
from finetune.data.checks.checking import check_samples
from finetune.data.checks.rules import Rules
from finetune.data.samples import Samples
from finetune.data.worker_processes import default_processes
from finetune.recipe import Source
from qwenvl import load_processor

WORDS = ("the", "total", "of", "this", "invoice", "is", "due", "on", "what", "says", "how", "many", "people", "are")
BATCH = 8
PHOTO = (1024, 768)  # pixels


class Check(NamedTuple):
    """What a check of all rows took: seconds, and MB at the peak."""

    rows: int
    opening: float
    checking: float
    own_memory: float
    worker_memory: float


class Rows(Dataset[dict[str, int]]):
    """What the collator is given: the index of each sample."""

    def __init__(self, rows: list[dict[str, int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, int]:
        return self.rows[index]


def write_rows(folder: Path, count: int, image: str) -> Path:
    """Write questions of 5 to 25 words about one image, with answers of 1 to 10."""
    draw = random.Random(0)
    file = folder / "rows.jsonl"
    with file.open("w") as lines:
        for _ in range(count):
            question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(*size))) for size in ((5, 25), (1, 10)))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": turns, "images": [image]}) + "\n")
    return file


def write_photos(folder: Path, count: int) -> Path:
    """Write JPEGs with detail everywhere, and a row for each."""
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
    """The samples of a file in the format `messages`."""
    return Samples([Source(path=str(file), format="messages")])


def measure_check(file: Path, model: str, processes: int, results: "Queue[Check]") -> None:
    """Runs in a process of its own, so that the peak memory is that of this check."""
    tokenizer = load_processor(model).tokenizer
    started = time.perf_counter()
    samples = samples_of(file)
    opened = time.perf_counter() - started
    started = time.perf_counter()
    checked = check_samples(samples, tokenizer, max_length=2048, processes=processes, show_progress=False)
    results.put(Check(len(checked.kept), opened, time.perf_counter() - started, *peak_memory()))


def peak_memory() -> tuple[float, float]:
    """Peak memory of this process and of its largest child, MB."""
    unit = 1e6 if sys.platform == "darwin" else 1e3
    own, child = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own, child


def measure_images(file: Path, model: str, workers: int) -> float:
    """Images per second, decoded and resized to uint8 by the collator in `workers` loader workers."""
    processor, samples = load_processor(model), samples_of(file)
    collator = Collator(samples, Rules(processor.tokenizer, None, processor.n_queries), processor.image_processor)
    rows = [{"sample": index} for index in range(len(samples))]
    loader = DataLoader(Rows(rows), BATCH, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0)
    for _ in loader:  # a first pass, which starts the workers
        pass
    started = time.perf_counter()
    done = sum(len(batch["pixel_values"]) for batch in loader)
    return done / (time.perf_counter() - started)


def main() -> None:
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
            results: Queue[Check] = spawn.Queue()
            measured = spawn.Process(target=measure_check, args=(rows, arguments.model, processes, results))
            measured.start()
            check = results.get()
            measured.join()
            times = f"{check.opening:>9.1f}s {check.checking:>9.1f}s {check.rows / check.checking:>12,.0f}"
            print(f"{processes:>9} {times} {check.own_memory:>10,.0f} {check.worker_memory:>18,.0f}")
        print(f"\ncollating {arguments.images:,} JPEGs of {PHOTO[0]} x {PHOTO[1]}")
        print("workers     images/s")
        for workers in sorted({0, arguments.processes}):
            print(f"{workers:>7} {measure_images(photos, arguments.model, workers):>12,.1f}")


if __name__ == "__main__":
    main()
