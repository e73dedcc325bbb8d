"""Make sets of small synthetic documents with conversations about them, to train and test a nano model.

    python -m examples.nano.making.documents --to data/nano --split train --count 20000 --format parquet --workers 2
    python -m examples.nano.making.documents --to data/nano --split test --count 300 --families form --kinds question
    python -m examples.nano.making.documents --to data/shift --split train --count 200 --families boarding --palette 32
    python -m examples.nano.making.documents --preview sheet.png --count 6

Run from the repository's root. The same arguments make the same set, whatever --workers says. Every free-form value
and every layout belongs to one split: none of `test` is in `train`.
"""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from examples.nano.making.documents.arguments import chosen_families, names_from
from examples.nano.making.documents.conversations import KINDS
from examples.nano.making.documents.document import LARGEST_PAGE, SMALLEST_PAGE
from examples.nano.making.documents.families import FAMILIES, HELD_OUT, LARGE
from examples.nano.making.documents.values import SPLITS
from finetune.errors import Interrupted, UserError
from finetune.files.path_errors import path_errors

PREVIEWED = 6  # documents of each family


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.nano.making.documents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", type=Path, metavar="DIR", help="folder to write to")
    where.add_argument("--preview", type=Path, metavar="FILE.png", help="write only a sheet of pages to look at")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, help=f"documents; with --preview, of each family (default {PREVIEWED})")
    listed = f"{', '.join(FAMILIES)}; by default all that have the kinds, without {', '.join((*HELD_OUT, *LARGE))}"
    parser.add_argument("--families", type=names_from("family", FAMILIES), help=f"of {listed}")
    kinds = tuple(KINDS)
    parser.add_argument("--kinds", type=names_from("kind", KINDS), default=kinds, help=f"of {', '.join(KINDS)}")
    parser.add_argument("--per-image", type=int, default=3, help="conversations about each document (default 3)")
    parser.add_argument("--image-size", type=int, default=140, help="width and height in pixels (default 140)")
    parser.add_argument("--difficulty", type=float, default=0.5, help="0 (clean pages) to 1 (default 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--palette", type=int, help="colours of an image, 2 to 256, for smaller files (32 suffice)")
    parser.add_argument(
        "--joined",
        type=float,
        default=0.0,
        help="share of documents asked about in one conversation (default 0)",
    )
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="images beside or inside")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    given = parser.parse_args(arguments)
    _check(parser, given)
    try:
        return _preview(given) if given.preview else _write(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End with exit code 2 if an argument is wrong; choose the families if none are given."""
    if given.to and given.count is None:
        parser.error("--count: say how many documents")
    limits = {
        "count": (1, 10_000_000),
        "per_image": (1, 100),
        "image_size": (SMALLEST_PAGE, LARGEST_PAGE),
        "difficulty": (0, 1),
        "palette": (2, 256),
        "joined": (0, 1),
        "workers": (1, 1024),
    }
    for name, (low, high) in limits.items():
        value = getattr(given, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')}: must be {low} to {high}, not {value}")
    given.families = chosen_families(
        parser, given.families, given.kinds, [family for family in FAMILIES if family not in (*HELD_OUT, *LARGE)]
    )


def _write(given: argparse.Namespace) -> int:
    from examples.nano.making.documents.write import Plan, write

    plan = Plan(
        split=given.split,
        families=given.families,
        kinds=given.kinds,
        count=given.count,
        per_image=given.per_image,
        image_size=given.image_size,
        difficulty=given.difficulty,
        seed=given.seed,
        palette=given.palette,
        joined=given.joined,
    )

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(number, saved=False)

    # Signals become exceptions, so that a half-written set is removed.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        write(plan, given.to, given.format, given.workers)
    except Interrupted as stopped:
        print(f"interrupted by {stopped}; nothing was written", file=sys.stderr)
        return stopped.exit_code
    except UserError:
        raise
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        with path_errors(given.to, "write the documents to", "Give another folder with --to"):
            raise error
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _preview(given: argparse.Namespace) -> int:
    from examples.nano.making.documents.preview import contact_sheet, sample_conversations

    count = given.count or PREVIEWED
    sheet = contact_sheet(
        given.families,
        count,
        seed=given.seed,
        split=given.split,
        image_size=given.image_size,
        difficulty=given.difficulty,
    )
    with path_errors(given.preview, "write the preview to", "Give another file with --preview"):
        given.preview.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(given.preview, "PNG")
    print(sample_conversations(given.families, given.kinds, seed=given.seed, split=given.split))
    return 0


if __name__ == "__main__":
    sys.exit(main())
