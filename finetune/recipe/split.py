"""`data.split` written out: a `part` for each source to train on, and the same sources' other part to evaluate on."""

from typing import Any

from pydantic import ValidationError

from finetune.recipe.problems import Problem, dotted
from finetune.recipe.sources import Split
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
    for source in sources:
        source["part"] = {**split, "take": "train"}
    del data["split"]


def _fits(split: Any) -> bool:
    try:
        Split.model_validate(split)
    except ValidationError:
        return False
    return True


def _refuse(document: Document, path: KeyPath, reason: str, remedy: str) -> None:
    document.problems.append((path, Problem(document.place(path), dotted(path), reason, remedy)))
