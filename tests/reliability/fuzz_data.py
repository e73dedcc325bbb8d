# ruff: noqa: E402 (the generators lie among the tests, which have to be found first)
"""Broken rows and broken images by the thousand: what is accepted, what is reported, and that it is one of the two.

    python tests/reliability/fuzz_data.py --rows 20000 --images 3600 --seed 0

Rows of all formats go through the check of the data, images through `load_image`. It fails at the first row or image
that is lost, wrongly accepted, reported without its place or reason, ends in another exception, takes longer than
the time limit, or when memory grows beyond its bound. The tests run the same generators on fewer.
"""

import argparse
import faulthandler
import re
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "helpers")]

import numpy as np
from broken_row_checks import check_broken_rows
from broken_rows import GOOD, KINDS
from encoded_images import pixels_of

from qwenvl import QwenVLTokenizer
from qwenvl.images.images import ImageError
from tests.qwenvl.images.test_image_decoding import KINDS as IMAGE_KINDS

MEMORY_GROWTH = 700_000_000
"""Bytes: the largest image that is accepted has 100 million pixels, and is decoded by about 8 bytes a pixel."""


def fuzz_rows(count: int, seed: int) -> Counter[tuple[str, str]]:
    """Rows of every format, by kind and fate."""
    tokenizer = QwenVLTokenizer.from_pretrained(TESTS.parent / "examples" / "tiny")
    counts = Counter()
    for number, row_format in enumerate(GOOD):
        share = count // len(GOOD) + (number < count % len(GOOD))
        with tempfile.TemporaryDirectory() as folder:
            counts += check_broken_rows(Path(folder), row_format, share, seed, tokenizer)
    return counts


def fuzz_images(count: int, seed: int, seconds: float) -> Counter[tuple[str, str]]:
    """Images of every kind, by kind and fate: right (to the pixel) or reported."""
    counts = Counter()
    for number in range(count):
        kind = IMAGE_KINDS[number % len(IMAGE_KINDS)]
        data, expected = kind(np.random.default_rng([seed, number]))
        either = isinstance(expected, tuple)
        start = time.monotonic()
        # A decoder that hangs would never come back to Python.
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            pixels = pixels_of(data, name=f"image {number}")
        except ImageError as error:
            pattern = expected[1] if either else expected
            assert isinstance(pattern, str), f"{kind.__name__} {number}: {error}"
            assert re.search(pattern, error.reason) and error.remedy and f"image {number}" in str(error), error
            fate = "reported"
        else:
            assert not isinstance(expected, str), f"{kind.__name__} {number}: accepted, not {expected}"
            np.testing.assert_array_equal(pixels, expected[0] if either else expected, f"{kind.__name__} {number}")
            fate = "accepted"
        finally:
            faulthandler.cancel_dump_traceback_later()
        counts[kind.__name__, fate] += 1
        counts["slowest, ms", "accepted"] = max(
            counts["slowest, ms", "accepted"], round((time.monotonic() - start) * 1000)
        )
    return counts


def show(title: str, counts: Counter[tuple[str, str]], kinds: list[str]) -> int:
    fates = ("accepted", "reported", "too_long")
    print(f"\n{title:<24}" + "".join(f"{fate:>10}" for fate in fates))
    for kind in kinds:
        print(f"{kind:<24}" + "".join(f"{counts[kind, fate]:>10,}" for fate in fates))
    sums = [sum(counts[kind, fate] for kind in kinds) for fate in fates]
    print(f"{'all':<24}" + "".join(f"{number:>10,}" for number in sums))
    return sum(sums)


def peak_memory() -> int:
    """Bytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="that one image may take")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata

    fuzz_rows(len(GOOD) * len(KINDS), arguments.seed + 1)
    fuzz_images(len(IMAGE_KINDS), arguments.seed + 1, arguments.seconds)
    before = peak_memory()
    start = time.monotonic()
    rows = fuzz_rows(arguments.rows, arguments.seed)
    images = fuzz_images(arguments.images, arguments.seed, arguments.seconds)
    assert show("rows", rows, list(KINDS)) == arguments.rows
    assert show("images", images, [kind.__name__ for kind in IMAGE_KINDS]) == arguments.images
    grown = peak_memory() - before
    print(
        f"\nall accounted for, no traceback, in {time.monotonic() - start:.0f} s; slowest image "
        f"{images['slowest, ms', 'accepted']} ms; peak memory grew by {grown / 1e6:.0f} MB"
    )
    assert grown < MEMORY_GROWTH


if __name__ == "__main__":
    main()
