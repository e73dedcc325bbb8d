"""The seconds of a run by phase, for its report."""

from collections.abc import Mapping
from typing import Any

from finetune.quantities import format_duration, is_number
from finetune.report.page import table

LONGEST = 10**12  # seconds; beyond any run


def phases_table(phases: Any) -> str:
    """A line for each phase of `run.json` (see `phases.Phases`), with its share of the time; empty without phases."""
    if not isinstance(phases, Mapping):
        return ""
    seconds = {
        name: phase["seconds"]
        for name, phase in phases.items()
        if isinstance(phase, Mapping) and is_number(phase.get("seconds")) and 0 <= phase["seconds"] < LONGEST
    }
    whole = sum(seconds.values()) or 1
    lines = [
        (name.replace("_", " "), format_duration(spent), f"{spent / whole:.1%}", str(phases[name].get("times", "")))
        for name, spent in seconds.items()
    ]
    return table(lines, head=("phase", "time", "share", "times"), numeric=(1, 2, 3)) if lines else ""
