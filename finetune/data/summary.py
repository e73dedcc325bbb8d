"""What was found in the data, for the terminal, run.json and the list of rows left out."""

import json
from collections.abc import Iterator

from finetune.data.checking import Checked


def describe_data(checked: Checked) -> str:
    """One line: rows, tokens, images, trained share, and how full the packs are."""
    lengths = checked.lengths
    text = (
        f"{len(checked.kept):,} of {checked.total:,} rows, {int(lengths.sum()):,} tokens "
        f"({checked.supervised.sum() / max(lengths.sum(), 1):.1%} trained), {int(checked.images.sum()):,} images"
    )
    left_out = [
        f"{len(checked.dropped_long):,} too long" if checked.dropped_long else "",
        f"{len(checked.problems):,} bad" if checked.problems else "",
    ]
    left_out = [reason for reason in left_out if reason]
    return text + (f"; left out: {', '.join(left_out)}" if left_out else "")


def lines_left_out(checked: Checked) -> Iterator[str]:
    """A JSON line for each row that is not trained on, with its reason."""
    for problem in checked.problems:
        yield json.dumps({"origin": str(problem.origin), "reason": str(problem)}, ensure_ascii=False) + "\n"
    for sample in checked.dropped_long:
        yield json.dumps({"origin": str(sample.origin), "reason": f"too long: {sample.tokens} tokens"}) + "\n"


def count_rows(checked: Checked) -> dict[str, int]:
    """Rows kept and left out, for run.json."""
    return {
        "total": checked.total,
        "kept": len(checked.kept),
        "too_long": len(checked.dropped_long),
        "bad": len(checked.problems),
    }
