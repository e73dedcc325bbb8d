"""`data.split` written out: a `part` for each source to train on, and the same sources' other part to evaluate on."""

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from pydantic import ValidationError

from finetune.recipe.problems import Problem, dotted
from finetune.recipe.sources import Split, name_given_twice
from finetune.recipe.yaml_file import Document, KeyPath

CUT = "split"
"""What stands for the sources in `evaluate.data`."""


def cut_sources(document: Document) -> None:
    """Replace `data.split` and `evaluate.data: split` by the sources' parts, as the resolved recipe keeps them."""
    value = document.value if isinstance(document.value, dict) else {}
    data, evaluate = ({} if not isinstance(part := value.get(key), dict) else part for key in ("data", "evaluate"))
    split, is_asked = data.get("split"), evaluate.get("data") == CUT
    if split is None:
        if is_asked:
            reason = "takes what data.split cuts off, and there is no data.split"
            _refuse(document, ("evaluate", "data"), reason, "set data.split: {eval: 0.1}")
        return
    sources = data.get("train")
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources) or not _fits(split):
        # What is wrong is told where it stands, and not once more for the evaluation.
        if is_asked:
            evaluate["data"] = sources
        return
    if evaluate and not is_asked:
        reason = "cuts off a part to evaluate on, and evaluate.data names other data"
        _refuse(document, ("data", "split"), reason, "set evaluate.data: split, or remove data.split")
        return
    for number, source in enumerate(sources):
        if source.get("part") is not None:
            _refuse(
                document, ("data", "train", number, "part"), "data.split cuts all sources", "remove one of the two"
            )
            return
    if is_asked:
        evaluate["data"] = [
            {key: item for key, item in source.items() if key != "weight"} | {"part": {**split, "take": "eval"}}
            for source in sources
        ]
        # The sources to train on have no names by which the scores of their other parts could be told apart.
        names = _names([str(source.get("path")) for source in sources])
        for source, name in zip(evaluate["data"], names, strict=True):
            if name is not None:
                source["name"] = name
    for source in sources:
        source["part"] = {**split, "take": "train"}
    del data["split"]


def _names(paths: Sequence[str]) -> list[str | None]:
    """Names by which sources differ: with as many of their folders as that takes, at last by number; None where the
    names of their files do."""
    deepest = max(len(PurePath(path).parts) for path in paths)
    for folders in range(deepest):
        names = [_name(path, folders) for path in paths]
        if name_given_twice(names) is None:
            return list(names) if folders else [None] * len(paths)
    return [f"{_name(path, 0)}_{number}" for number, path in enumerate(paths, start=1)]


def _name(path: str, folders: int) -> str:
    parts = PurePath(path).with_suffix("").parts[-1 - folders :]
    return re.sub(r"[^\w.-]+", "_", "_".join(parts)).lstrip("_.-") or "data"


def _fits(split: Any) -> bool:
    try:
        Split.model_validate(split)
    except ValidationError:
        return False
    return True


def _refuse(document: Document, path: KeyPath, reason: str, remedy: str) -> None:
    document.problems.append((path, Problem(document.place(path), dotted(path), reason, remedy)))
