"""`finetune bench`: memory and time of a recipe's optimizer steps, and of the published settings, on this device.

Every row trains a new model with random weights for some steps, with the trainer of a run, on synthetic samples of
known lengths. No data and no weights are read.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from finetune.bench.card_speed import Peak, find_peak
from finetune.bench.published import published_recipe
from finetune.bench.run import Way, longest_sample, run_row
from finetune.bench.subject import Subject, find_subject, own_torch_device, ways_to_train
from finetune.bench.table import OURS, PUBLISHED, SAMPLES, Row, as_json, in_words, markdown, terminal_table
from finetune.bench.workload import draw_lengths
from finetune.files.atomic_writes import make_folder, write_text
from finetune.files.path_errors import path_errors
from finetune.recipe import Recipe
from finetune.run.environment import describe_environment
from finetune.terminal import Say, say

JSON_FILE, MARKDOWN_FILE = "bench.json", "bench.md"
GIVE_ANOTHER = "Give another folder by --to"

WARM_UP = 2
"""Steps before the measured ones."""


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        recipe: the resolved recipe.
        name: of the recipe, for the reader.
        lengths: one row each for every way to train: tokens of a sample, or "mix".
        steps: to be measured.
        size: "recipe", or "full" for the published sizes.
        settings: ours, published, or both.
        both: measure LoRA and Q-LoRA, whichever the recipe has.
    """

    recipe: Recipe
    name: str
    lengths: Sequence[str]
    steps: int
    size: str = "recipe"
    settings: Sequence[str] = (OURS, PUBLISHED)
    both: bool = False


def bench(wanted: Bench, to: Path, say: Say = say) -> list[Row]:
    """Measure all rows; after each one, rewrite `bench.json` and `bench.md` with the rows so far.

    Args:
        to: the folder of these files; created if it does not exist.
        say: prints a labelled line.

    Returns:
        The rows, including those that did not fit into memory.

    Raises:
        InputError: the recipe, the lengths or the folder are wrong.
    """
    transformers_logging.set_verbosity_error()
    recipe = wanted.recipe
    subject = find_subject(recipe, wanted.size)
    for samples in wanted.lengths:  # refuse wrong lengths before the first row is run
        draw_lengths(samples, 1, subject.config, most=longest_sample(recipe, subject.config))
    device = own_torch_device()
    peak = find_peak(device, subject.dtype(recipe))
    ways = make_ways(wanted, subject, device, peak)
    facts = describe(wanted, subject, device, peak)
    for what, fact in facts.items():
        say(what, fact)
    with path_errors(to, "create the folder", GIVE_ANOTHER):
        make_folder(to.absolute())
    rows: list[Row] = []
    count = len(ways) * len(wanted.lengths)
    for way in ways:
        for samples in wanted.lengths:
            row = run_row(way, samples, warm_up=WARM_UP, steps=wanted.steps)
            rows.append(row)
            say(f"row {len(rows)}/{count}", in_words(row))
            record = {"facts": facts, "environment": describe_environment(facts["device"]), "rows": as_json(rows)}
            with path_errors(to, "write the results to", GIVE_ANOTHER):
                write_text(to / JSON_FILE, json.dumps({**record, "recipe": recipe.to_yaml()}, indent=2) + "\n")
                write_text(to / MARKDOWN_FILE, markdown(f"finetune bench {wanted.name}", facts, rows))
    for line in ["", *terminal_table(rows), ""]:
        say(line)
    say("results", f"{to / MARKDOWN_FILE}, {to / JSON_FILE}")
    return rows


def make_ways(wanted: Bench, subject: Subject, device: torch.device, peak: Peak) -> list[Way]:
    """The ways to train to be measured, in order."""
    ways = []
    for weights, recipe in ways_to_train(wanted.recipe, wanted.both):
        for settings in wanted.settings:
            own = recipe if settings == OURS else published_recipe(recipe)
            ways.append(Way(weights, settings, own, subject, device, peak))
    return ways


def describe(wanted: Bench, subject: Subject, device: torch.device, peak: Peak) -> dict[str, str]:
    """What is measured on which device, for the first lines."""
    dtype = str(subject.dtype(wanted.recipe)).removeprefix("torch.")
    versions = describe_environment()["versions"]
    return {
        "model": f"{subject.name}, {subject.parameters() / 1e9:.3g} B parameters, random, {dtype}",
        "device": device_name(device),
        "arithmetic": f"{peak.flops / 1e12:.4g} TFLOP/s at most ({peak.source})",
        "measured": f"{wanted.steps} steps of {SAMPLES} samples, one image each, after {WARM_UP} to warm up",
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items() if version),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """A GPU's name as its driver gives it; a CPU's name and the threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}), {torch.get_num_threads()} threads of {os.cpu_count()}"
