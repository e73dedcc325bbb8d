"""From plain values to a validated recipe, or to every problem in it: place, key, reason, remedy."""

import copy
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from finetune.recipe.checks import findings_across
from finetune.recipe.problems import Problem, RecipeError, dotted, nearest
from finetune.recipe.schema import keys_at, part, schema_of
from finetune.recipe.section import CONTRADICTION, Finding, Section
from finetune.recipe.train_section import OWNED
from finetune.recipe.wording import expected, found, remedy
from finetune.recipe.yaml_file import Document, KeyPath

ELSEWHERE = {
    "batch_size": "train.per_device_train_batch_size",
    "epochs": "train.num_train_epochs",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "evaluation_strategy": "train.eval_strategy",
    "init_lora_weights": "adapter.init",
    "load_in_4bit": "model.quantization",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.r",
    "lora_target_modules": "adapter.targets",
    "lr": "train.learning_rate",
    "max_seq_length": "data.max_length",
    "model_max_length": "data.max_length",
    "model_name_or_path": "model.path",
    "modules_to_save": "adapter.train_embeddings",
    "q_lora": "model.quantization",
    "target_modules": "adapter.targets",
    "torch_dtype": "model.dtype",
    "use_dora": "adapter.dora",
    "use_lora": "adapter",
    "use_rslora": "adapter.rslora",
    "warmup_ratio": "train.warmup_steps",
}
"""What PEFT, older Transformers and the published script call keys of a recipe."""


def validate(document: Document, kind: type[Section]) -> Any:
    """Make a recipe of a document.

    Args:
        document: the plain values and their places.
        kind: the class of a whole recipe.

    Raises:
        RecipeError: with everything that is wrong: single values, keys of one section that do not go together, and
            sections that do not go together. A section with a wrong value is not compared with others.
    """
    collected = _Problems(document, kind)
    if not isinstance(document.value, dict):
        keys = ", ".join(kind.model_fields)
        collected.add((), f"a recipe is a mapping with the keys {keys}, and this is {found(document.value)}")
        raise RecipeError(collected.problems)
    try:
        recipe = kind.model_validate(document.value)
    except ValidationError as error:
        collected.add_errors(error)
    else:
        if not document.problems:
            return recipe
    collected.add_contradictions()
    raise RecipeError(collected.problems)


class _Problems:
    """The problems of a document, one for each value.

    Attributes:
        problems: found so far.
        wrong: the paths of the values that have one.
    """

    def __init__(self, document: Document, kind: type[Section]):
        self.document, self.kind = document, kind
        self.schema = schema_of(kind)
        self.problems = [problem for _, problem in document.problems]
        self.wrong = {path for path, _ in document.problems}

    def add(self, path: KeyPath, reason: str, remedy: str = "") -> None:
        """Add a problem with the value at `path`, unless there is one with it or above it already."""
        if any(_is_above(wrong, path) for wrong in self.wrong if wrong):
            return
        self.problems.append(Problem(self.document.place(path), dotted(path), reason, remedy))
        self.wrong.add(path)

    def add_errors(self, error: ValidationError) -> None:
        """Add pydantic's errors as problems."""
        errors = error.errors(include_url=False)
        meant = {
            dotted(key)
            for one in errors
            if one["type"] == "extra_forbidden"
            for key in self.add_unknown(one["loc"][:-1], str(one["loc"][-1]))
        }
        for one in errors:
            path = one["loc"]
            if one["type"] == CONTRADICTION:
                self.add_findings(one["ctx"]["findings"], path)
            elif one["type"] == "missing" and dotted(path) not in meant:
                self.add(path, "this key is required", f"give it {self.expected(path)}")
            elif one["type"] == "too_short" and any(_is_above(path, other["loc"]) for other in errors if other != one):
                pass  # pydantic does not count items that are wrong; they are reported themselves
            elif one["type"] not in ("missing", "extra_forbidden"):
                path, value = self.existing(path)
                reason = f"expected {self.expected(path)}, found {found(value)}"
                self.add(path, reason, remedy(value, self.schema_at(path), self.schema))

    def add_contradictions(self) -> None:
        """Add keys that do not go together, checked without the values that are wrong by themselves."""
        rest = copy.deepcopy(self.document.value)
        for path in self.wrong:
            _remove(rest, path)
        right = {}
        for name, field in self.kind.model_fields.items():
            value = rest.get(name, field.get_default(call_default_factory=True))
            try:
                right[name] = TypeAdapter(field.rebuild_annotation()).validate_python(value)
            except ValidationError as error:
                for one in error.errors(include_url=False):
                    if one["type"] == CONTRADICTION:
                        self.add_findings(one["ctx"]["findings"], (name, *one["loc"]))
        self.add_findings(findings_across(right), ())

    def schema_at(self, path: KeyPath) -> dict[str, Any]:
        about = part(self.schema, path)
        assert about is not None, f"pydantic reported {dotted(path)}, which the schema does not have"
        return about

    def expected(self, path: KeyPath) -> str:
        return expected(self.schema_at(path), self.schema)

    def existing(self, path: KeyPath) -> tuple[KeyPath, Any]:
        """The value at `path`, and the path without the steps that name the member of a union pydantic tried."""
        value = self.document.value
        for depth, step in enumerate(path):
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return path[:depth], value
        return path, value

    def add_unknown(self, section: KeyPath, key: str) -> list[KeyPath]:
        """Add an unknown key; return the paths of the keys of its section that were likely meant."""
        path = (*section, key)
        owned = OWNED if section == ("train",) else {}
        if key in owned:
            instead, why = owned[key]
            reason = "is set elsewhere" if instead else "is not for a recipe to set"
            self.add(path, reason, ": ".join(part for part in (instead and f"use {instead}", why) if part))
            return []
        keys = keys_at(self.schema, section)
        near = [] if key in ELSEWHERE else nearest(key, [*keys, *owned])
        meant = [(owned[name][0] or f"train.{name}") if name in owned else dotted((*section, name)) for name in near]
        meant = list(dict.fromkeys(meant)) or self.elsewhere(key)
        if meant:
            self.add(path, "unknown key", f"did you mean {' or '.join(meant)}?")
        elif section == ("train",):
            self.add(path, "unknown key", "train takes the fields of TRL's SFTConfig by their names")
        else:
            self.add(path, "unknown key", f"the keys here are {', '.join(keys)}")
        return [(*section, name) for name in near if name in keys]

    def elsewhere(self, key: str) -> list[str]:
        """Where else in a recipe there is a key of this name."""
        if key in ELSEWHERE:
            return [ELSEWHERE[key]]
        if key in self.kind.model_fields:
            return [key]
        return [f"{section}.{key}" for section in self.kind.model_fields if key in keys_at(self.schema, (section,))]

    def add_findings(self, findings: Iterable[Finding], above: KeyPath) -> None:
        """Add findings of the section at `above`, with the places of all their keys."""
        for finding in findings:
            paths = [(*above, *key.split(".")) for key in finding.keys]
            if any(_is_above(wrong, path) for path in paths for wrong in self.wrong if wrong):
                continue
            first = next((path for path in paths if path in self.document.places), paths[0])
            others = [self.described(path) for path in paths if path != first]
            reason = finding.reason + (f" (see {', '.join(others)})" if others else "")
            problem = Problem(self.document.place(first), dotted(first), reason, finding.remedy)
            if problem not in self.problems:
                self.problems.append(problem)

    def described(self, path: KeyPath) -> str:
        """A key with the place of its value."""
        place = self.document.places.get(path)
        if place is None:
            return f"{dotted(path)} by its default"
        return f"{dotted(path)} in {f'line {place.line}' if place.override is None else place}"


def _is_above(path: KeyPath, other: KeyPath) -> bool:
    return other[: len(path)] == path


def _remove(value: Any, path: KeyPath) -> None:
    # A list is removed as a whole: without one item the others would have other indices.
    while path and isinstance(path[-1], int):
        path = path[:-1]
    for step in path[:-1]:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return
    if path and isinstance(value, dict):
        value.pop(path[-1], None)
