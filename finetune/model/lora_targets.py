"""Which layers get LoRA: targets by the end of their names, layers by number, and patterns of ranks and alphas."""

import re
from collections.abc import Iterable, Mapping, Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from finetune.errors import UserError

LANGUAGE, VISION = "transformer.h.", "transformer.visual."


def find_targets(model: nn.Module, targets: Sequence[str], inside: str, key: str) -> list[str]:
    """Names of the linears under `inside` that end in one of the targets, whole dotted parts compared.

    Raises:
        UserError: a target that matches none; the message lists what there is.
    """
    linears = [name for name in _linears(model) if name.startswith(inside)]
    found: list[str] = []
    for target in targets:
        matched = [name for name in linears if _matches(name, target)]
        if not matched:
            raise UserError(f"{key}: {target!r} matches nothing under {inside[:-1]}. There are: {_ends(linears)}")
        found += [name for name in matched if name not in found]
    return found


def find_language_targets(model: nn.Module, targets: Sequence[str], layers: Sequence[int] | None) -> list[str]:
    """The targets in the language model, in all of its layers or in those with these numbers, the first is 0.

    PEFT's own `layers_to_transform` takes the first number in a layer's name, which of the vision tower's layers is
    the tower's. Here the numbers are the language model's alone.

    Raises:
        UserError: a target that matches none, or a number that no layer has.
    """
    found = find_targets(model, targets, LANGUAGE, "adapter.targets")
    if layers is None:
        return found
    numbers = {_layer(name) for name in _linears(model) if name.startswith(LANGUAGE)}
    if absent := sorted(set(layers) - numbers):
        raise UserError(
            f"adapter.layers_to_transform: there is no layer {', '.join(map(str, absent))}: the language model's are "
            f"0 to {max(numbers)}"
        )
    chosen = [name for name in found if _layer(name) in layers]
    for target in targets:
        if not any(_matches(name, target) for name in chosen):
            raise UserError(
                f"adapter.targets: {target!r} is in none of the layers that adapter.layers_to_transform names"
            )
    return chosen


def is_target(settings: LoraConfig, name: str) -> bool:
    """Whether PEFT puts LoRA on the module of this name, by an adapter's settings."""
    found = check_target_module_exists(settings, name)
    # Neither a truth value alone: a regular expression gives a match, and an excluded module an object.
    return found is True or isinstance(found, re.Match)


def refuse_idle_patterns(patterns: Mapping[str, object], targets: Sequence[str], key: str) -> None:
    """Check that each pattern says something of a layer with LoRA, and no layer is matched by two, of which PEFT would
    take the first.

    Args:
        patterns: by the end of a layer's name, or a regular expression of it.
        targets: names of the layers with LoRA.

    Raises:
        UserError: names the pattern.
    """
    taken: dict[str, str] = {}
    for pattern in patterns:
        # As `peft.utils.other.get_pattern_key` matches.
        matched = [name for name in targets if re.match(rf"(.*\.)?({pattern})$", name)]
        if not matched:
            raise UserError(f"{key}: {pattern!r} matches none of the layers with LoRA. There are: {_ends(targets)}")
        for name in matched:
            if name in taken:
                raise UserError(
                    f"{key}: {name} is matched by {taken[name]!r} and by {pattern!r}: write them so that one does"
                )
            taken[name] = pattern


def shortest(model: nn.Module, given: Sequence[str], wanted: list[str]) -> list[str]:
    """The targets as given, or full names where PEFT, which searches the whole model, would match more."""
    everywhere = {name for name in _linears(model) for target in given if _matches(name, target)}
    return list(given) if everywhere == set(wanted) else wanted


def _linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _layer(name: str) -> int:
    return int(name.removeprefix(LANGUAGE).partition(".")[0])


def _ends(names: Iterable[str]) -> str:
    return ", ".join(sorted({".".join(name.split(".")[-2:]) for name in names}))
