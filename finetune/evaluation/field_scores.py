"""The score of the task `fields` over all documents: micro F1, exact match and ANLS by field, accuracy of the JSON."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune.evaluation.bootstrap import Interval, difference_interval, score_interval
from finetune.metrics.document_fields import FieldsAsked, FieldsFound, f1_of, score_fields
from finetune.quantities import format_loss
from finetune.terminal import terminal_line

KEY = "fields"
"""Of a record: what was found in its reply."""


def fields_record(reply: str, asked: FieldsAsked) -> dict[str, Any]:
    """What a record keeps of the fields in a reply."""
    found = score_fields(reply, asked)
    kept = {"exact": found.exact, "anls": found.anls, "right": found.right, "given": found.given, "gold": found.gold}
    if asked.is_json:
        kept |= {"tree": found.tree, "broken": found.broken}
    return kept


def fields_found(record: Mapping[str, Any]) -> FieldsFound:
    """What `fields_record` has kept."""
    return FieldsFound(**{"tree": None, "broken": False, **record[KEY]})


def micro_f1(records: Sequence[Mapping[str, Any]]) -> tuple[float, Interval]:
    """F1 over the values of all documents together, and its 95% interval by resampling documents."""
    return f1_of(*_counts(records).sum(axis=0)), score_interval(range(len(records)), None, _f1_at(_counts(records)))


def f1_difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> Interval:
    """The interval of the difference between two models on the same documents."""
    # Both are looked up by place: first all of ours, then all of theirs.
    at = _f1_at(np.concatenate([_counts(ours), _counts(theirs)]))
    return difference_interval(range(len(ours)), range(len(ours), 2 * len(ours)), None, at)


def fields_summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As in `results.json`: precision and recall, accuracy of the JSON and how many are broken, and a line a field."""
    found = [fields_found(record) for record in records]
    right, given, gold = (sum(getattr(one, key) for one in found) for key in ("right", "given", "gold"))
    by_field: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        for name, exact in one.exact.items():
            by_field.setdefault(name, []).append((exact, one.anls[name]))
    summary: dict[str, Any] = {
        "precision": right / given if given else float(not gold),
        "recall": right / gold if gold else 1.0,
        "by_field": {
            name: {
                "exact": sum(exact for exact, _ in scores) / len(scores),
                "anls": sum(similar for _, similar in scores) / len(scores),
                "documents": len(scores),
            }
            for name, scores in by_field.items()
        },
    }
    of_json = [one for record, one in zip(records, found, strict=True) if "broken" in record[KEY]]
    if of_json:
        trees = [one.tree for one in of_json if one.tree is not None]
        summary["json"] = {
            "tree_accuracy": sum(trees) / len(trees) if trees else None,
            "replies": len(of_json),
            "broken": sum(one.broken for one in of_json),
            "too_large": len(of_json) - len(trees),
        }
    return summary


def field_lines(results: Mapping[str, Any], compared: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The lines at the end of an evaluation, for the JSON and for each field; none where the task reads no fields."""
    fields = results.get("fields")
    if fields is None:
        return []
    lines = [("  all fields", f"precision {format_loss(fields['precision'])}, recall {format_loss(fields['recall'])}")]
    if found := fields.get("json"):
        accuracy = "-" if found["tree_accuracy"] is None else format_loss(found["tree_accuracy"])
        said = f"tree edit accuracy {accuracy}; {found['broken']:,} of {found['replies']:,} replies hold no JSON"
        if found["too_large"]:
            said += f"; {found['too_large']:,} are too large for the accuracy"
        lines.append(("  json", said))
    for name, one in fields["by_field"].items():
        other = ""
        if compared:
            theirs = compared["fields"]["by_field"][name]
            other = f"; compared: {format_loss(theirs['exact'])}, {format_loss(theirs['anls'])}"
        said = f"exact {format_loss(one['exact'])}, anls {format_loss(one['anls'])}, {one['documents']:,} documents"
        lines.append((f"  {terminal_line(name)}", said + other))
    return lines


def _counts(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(records, 2): the right values, and those of reply and gold together."""
    kept = [record[KEY] for record in records]
    return np.array([(one["right"], one["given"] + one["gold"]) for one in kept], np.float64)


def _f1_at(counts: np.ndarray) -> Callable[[np.ndarray, np.ndarray | None], float]:
    return lambda places, _: f1_of(*counts[places.astype(np.int64)].sum(axis=0))
