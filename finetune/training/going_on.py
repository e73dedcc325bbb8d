"""Going on from a trained adapter: what `adapter.from` is for a run, also when that folder is gone on a resume."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.model.base import Base
from finetune.model.given_adapter import GivenAdapter, find_given_adapter
from finetune.recipe import Adapter, Recipe
from finetune.run.checkpoints import find_last_good
from finetune.run.folder import RunFolder

ADAPTER_FROM = "adapter_from"
"""Key of a run's identity: the SHA-256 of the adapter that it goes on from."""


def settle_given_adapter(
    recipe: Recipe, base: Base, run: RunFolder, stored: Mapping[str, Any] | None
) -> tuple[Recipe, GivenAdapter | None, str | None]:
    """Find the adapter that a run goes on from.

    A run that has a checkpoint needs it no more: where it is gone, the run's own notes say what it was.

    Args:
        stored: what run.json says; None where there is none.

    Returns:
        The recipe with `adapter` settled; the adapter, or None; and its SHA-256, or None.

    Raises:
        InputError: see `find_given_adapter`.
    """
    if recipe.adapter is None or recipe.adapter.from_ is None:
        return recipe, None, None
    noted = None if stored is None else stored.get("identity")
    if noted is not None and noted.get(ADAPTER_FROM) and not Path(recipe.adapter.from_).exists():
        as_it_was = _noted_adapter(noted)
        is_the_same = as_it_was is not None and as_it_was.from_ == recipe.adapter.from_
        if as_it_was is not None and is_the_same and find_last_good(run.checkpoints).path is not None:
            given = {key: getattr(recipe.adapter, key) for key in recipe.adapter.model_fields_set}
            if given.get("train_embeddings") == "auto":
                given.pop("train_embeddings")
            adapter = as_it_was.model_copy(update=given)
            return recipe.model_copy(update={"adapter": adapter}), None, noted[ADAPTER_FROM]
    recipe, adapter_given = find_given_adapter(recipe, base)
    assert adapter_given is not None, "adapter.from is set"
    return recipe, adapter_given, adapter_given.sha256


def _noted_adapter(identity: Mapping[str, Any]) -> Adapter | None:
    try:
        return Adapter.model_validate(identity["recipe"]["adapter"], strict=False)
    except (ValidationError, KeyError, TypeError):
        return None
