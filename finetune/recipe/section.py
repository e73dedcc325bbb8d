"""What a section of a recipe is: immutable, strict, with checks of keys that do not go together."""

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError


class Finding(NamedTuple):
    """Keys that do not go together, or a value that its type allows but that is wrong."""

    keys: tuple[str, ...]
    """Dotted paths from the section that found it; the first is the one to look at."""
    reason: str
    remedy: str = ""


CONTRADICTION = "contradiction"
"""Type of the pydantic error that carries findings."""


class Section(BaseModel):
    """Immutable; unknown keys are refused; `"3"` is not 3, 3.0 is not 3, true is not 1, but 3 may stand for 3.0."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def findings(self) -> Iterator[Finding]:
        """Keys of this section that do not go together, though each is right by itself."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_findings(self) -> Self:
        findings = tuple(self.findings())
        if findings:
            text = "; ".join(f"{', '.join(finding.keys)}: {finding.reason}" for finding in findings)
            raise PydanticCustomError(CONTRADICTION, "{text}", {"text": text, "findings": findings})
        return self


class ReadOnlyDict(dict[str, Any]):
    """A mapping in a recipe, as immutable as the sections."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a recipe does not change after it was read")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none because it changes
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[Self], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)


def read_only(value: Any) -> Any:
    """Lists as tuples and mappings as read-only ones, all the way down."""
    if isinstance(value, dict):
        return ReadOnlyDict({key: read_only(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(read_only(item) for item in value)
    return value


Word = Annotated[str, Field(min_length=1)]
Words = Annotated[tuple[Word, ...], Strict(False)]
Count = Annotated[int, Field(ge=1)]
