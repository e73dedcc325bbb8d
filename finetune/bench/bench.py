"""`finetune bench`: memory and time of a recipe's optimizer steps, beside the published settings, on this device.

Every row trains a fresh model with random weights for some steps, by the trainer that a run has, on made-up samples of
known lengths. No data and no weights are read.
"""

import json
import os
import platform
from collections.abc import Callable, Sequence
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
from finetune.recipe import Recipe
from finetune.run.environment import describe_environment

JSON_FILE, MARKDOWN_FILE = "bench.json", "bench.md"

WARM_UP = 2
"""Steps before those that are measured."""


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        recipe: the resolved recipe.
        name: of the recipe, for the reader.
        lengths: the rows of each way to train: tokens of a sample, or "mix".
        steps: that are measured.
        size: "recipe", or "full" for the published sizes.
        settings: of ours and published.
        both: LoRA and Q-LoRA, whichever the recipe says.
    """

    recipe: Recipe
    name: str
    lengths: Sequence[str]
    steps: int
    size: str = "recipe"
    settings: Sequence[str] = (OURS, PUBLISHED)
    both: bool = False


def bench(wanted: Bench, to: Path, say: Callable[[str], None] = print) -> list[Row]:
    """Measure, and write `bench.json` and `bench.md` into a folder, anew after each row.

    Args:
        to: the folder; created if need be.
        say: prints a line.

    Returns:
        The rows, those that did not fit into the memory too.

    Raises:
        UserError, ValueError, FileNotFoundError: the input is wrong (see the message).
    """
    transformers_logging.set_verbosity_error()
    recipe = wanted.recipe
    subject = find_subject(recipe, wanted.size)
    for samples in wanted.lengths:  # what is wrong is told before the first of them is run
        draw_lengths(samples, 1, subject.config, most=longest_sample(recipe, subject.config))
    device = own_torch_device()
    peak = find_peak(device, subject.dtype(recipe))
    ways = make_ways(wanted, subject, device, peak)
    facts = describe(wanted, subject, device, peak)
    for what, fact in facts.items():
        say(f"{what:<11} {fact}")
    make_folder(to.absolute())
    rows: list[Row] = []
    count = len(ways) * len(wanted.lengths)
    for way in ways:
        for samples in wanted.lengths:
            row = run_row(way, samples, warm_up=WARM_UP, steps=wanted.steps)
            rows.append(row)
            say(f"{f'row {len(rows)}/{count}':<11} {in_words(row)}")
            record = {"facts": facts, "environment": describe_environment(facts["device"]), "rows": as_json(rows)}
            write_text(to / JSON_FILE, json.dumps({**record, "recipe": recipe.to_yaml()}, indent=2) + "\n")
            write_text(to / MARKDOWN_FILE, markdown(f"finetune bench {wanted.name}", facts, rows))
    for line in ["", *terminal_table(rows), ""]:
        say(line)
    say(f"{'results':<11} {to / MARKDOWN_FILE}, {to / JSON_FILE}")
    return rows


def make_ways(wanted: Bench, subject: Subject, device: torch.device, peak: Peak) -> list[Way]:
    """The ways to train that are measured, one after the other."""
    ways = []
    for weights, recipe in ways_to_train(wanted.recipe, wanted.both):
        for settings in wanted.settings:
            own = recipe if settings == OURS else published_recipe(recipe)
            ways.append(Way(weights, settings, own, subject, device, peak))
    return ways


def describe(wanted: Bench, subject: Subject, device: torch.device, peak: Peak) -> dict[str, str]:
    """What is measured where, for the first lines."""
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
    """A GPU as its driver calls it; of a CPU the threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}), {torch.get_num_threads()} threads of {os.cpu_count()}"
