"""Run one real Q-LoRA step at the published model size without a GPU, and measure all of it.

    python examples/full_size_qlora.py --to /tmp/small --size small
    python examples/full_size_qlora.py --to random-full --size full
    python examples/full_size_qlora.py --to /tmp/mine --checkpoint Qwen-VL-Chat --conversations 8
    python examples/full_size_qlora.py --to /tmp/least --recipe recipes/docvqa_qlora_6gb.yaml

Writes a checkpoint in the published layout with random weights, and a few synthetic documents with questions about
them. Then runs the recipe for a card of 8 GB as a user would, with `finetune RECIPE` in a process of its own: the
`.bin` files are read and quantised to NF4, an image is encoded, one optimizer step is taken and the adapter is saved.
Time and memory do not depend on the values of the weights. Images are encoded before the step, so that both are
measured separately.

`full` is Qwen-VL: 853 tensors, 9.66 B parameters, ten files of 19.3 GB in all; it takes that much disk, and minutes on
one core. `small` has the same widths and 2 + 2 of the 32 + 48 layers: 3.6 GB. `--checkpoint` uses an existing
checkpoint.

Two kinds of memory are measured, which needs Linux: a process's own (anonymous), and all resident pages, which include
mapped pages of the checkpoint's files that the system can reclaim. `DIR/figures.json` has everything that is printed;
without `--keep` the rest is removed.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from finetune.files.disk_space import NotEnoughDiskSpace, check_disk_space
from finetune.quantities import format_bytes
from finetune.run.folder import RunFolder
from qwenvl.checkpoint.checkpoint_files import stored_tensors

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "docvqa_qlora_8gb.yaml"
LAYERS = {"full": (32, 48), "small": (2, 2)}
"""Size -> layers of the language model and of the vision transformer."""
DISK = {"full": 21_000_000_000, "small": 4_000_000_000}
"""Size -> bytes of checkpoint and run."""

LIMIT = 24_000_000_000
"""Most anonymous memory that the training process may take, bytes: within reach of a common machine."""

SAMPLE_EVERY = 0.02  # seconds between two samples of a process's memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--size", choices=tuple(LAYERS), default="small", help="of the checkpoint that is written")
    source.add_argument("--checkpoint", type=Path, help="a folder to train on instead")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="(default: the one for a card of 8 GB)")
    parser.add_argument("--vocabulary", type=Path, help="qwen.tiktoken; by default the one of the dashscope package")
    parser.add_argument("--conversations", type=int, default=1, help="of the step, each with an image (default 1)")
    parser.add_argument("--keep", action="store_true", help="keep checkpoint, data and run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of the recipe")
    given = parser.parse_intermixed_args()
    if given.to.exists():
        parser.error(f"--to: {given.to} exists; give another folder")
    if not Path("/proc/self/status").exists():
        parser.error("memory is measured by /proc, which this system does not have: run it on Linux")
    # The commands run in the repository's root.
    for name in ("to", "checkpoint", "recipe", "vocabulary"):
        if getattr(given, name) is not None:
            setattr(given, name, getattr(given, name).absolute())
    if given.checkpoint is None:
        try:
            check_disk_space(given.to, DISK[given.size], "the checkpoint and a run on it")
        except NotEnoughDiskSpace as error:
            parser.error(str(error))
    given.to.mkdir(parents=True)
    try:
        figures = measure(given)
    finally:
        if not given.keep:
            for folder in ("checkpoint", "data", "run"):
                shutil.rmtree(given.to / folder, ignore_errors=True)
    (given.to / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print("\n".join(lines(figures)))
    return 0 if figures["peak"]["anonymous"] <= LIMIT else 1


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All figures, as in `DIR/figures.json`; memory in bytes, times in seconds."""
    written: dict[str, Any] = {}
    checkpoint = given.checkpoint
    if checkpoint is None:
        checkpoint = given.to / "checkpoint"
        written["write"] = write_checkpoint(checkpoint, given.size, given.vocabulary or published_vocabulary())
    write_documents(given.to / "data", given.conversations)
    command = training_command(checkpoint, given.to, given.recipe, given.conversations, given.overrides)
    started = time.time()
    process = watch([sys.executable, "-m", *command])
    run = RunFolder(given.to / "run")
    description = run.read_run()
    assert description is not None, "a run that has ended describes itself"
    phases = description["phases"]
    step = next(record for record in run.read_metrics() if "loss" in record)
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in stored_tensors(checkpoint)]
    return {
        "machine": machine(),
        "command": shlex.join(command),
        "checkpoint": {"bytes": sum(sizes), "tensors": len(sizes), "largest": max(sizes)},
        "parameters": description["parameters"],
        "phases": {
            **written,
            "start": process.between(started, moment(phases["read"]["began"])),
            **{name: process.of(phase) for name, phase in phases.items()},
        },
        "peak": process.peak(),
        "limit": LIMIT,
        "seconds": description["wall_seconds"],
        "step": {key: step[key] for key in ("loss", "grad_norm", "supervised_tokens")},
        "adapter": (run.adapter / "adapter_model.safetensors").stat().st_size,
        "versions": description["environment"]["versions"],
        "commit": description["environment"]["commit"],
    }


# --- commands --------------------------------------------------------------------------------------------------------


def published_vocabulary() -> Path:
    """The vocabulary in the dashscope package."""
    try:
        return Path(str(files("dashscope") / "resources" / "qwen.tiktoken"))
    except ModuleNotFoundError:
        sys.exit("--vocabulary: give the qwen.tiktoken of a checkpoint, or pip install dashscope, which has it")


def write_checkpoint(folder: Path, size: str, vocabulary: Path) -> dict[str, Any]:
    """Write a checkpoint with random weights, and return what that took."""
    layers, vision_layers = LAYERS[size]
    script = ROOT / "examples" / "make_random_checkpoint.py"
    options = ["--to", folder, "--vocabulary", vocabulary, "--layers", layers, "--vision-layers", vision_layers]
    started = time.time()
    return watch([sys.executable, script, *options]).between(started, time.time())


def write_documents(folder: Path, count: int) -> None:
    """Write training data: a question about each of `count` documents."""
    options = ["--to", folder, "--count", count, "--per-image", 1, "--kinds", "question", "--image-size", 448]
    watch([sys.executable, "-m", "examples.nano.making.documents", *options])


def training_command(
    checkpoint: Path, folder: Path, recipe: Path, conversations: int, overrides: Sequence[str]
) -> list[str]:
    """One optimizer step of the recipe, over all conversations."""
    data = {"path": str(folder / "data" / "train.jsonl"), "format": "messages"}
    settings = {
        "model.path": str(checkpoint),
        "model.dtype": "bfloat16",
        "data.train": json.dumps(data),
        "data.vision_cache": "memory",
        "data.workers": 0,
        "train.max_steps": 1,
        "train.per_device_train_batch_size": conversations,
        "train.gradient_accumulation_steps": 1,
        "train.logging_steps": 1,
        "train.warmup_steps": 0,
        "evaluate": "null",
        "output": str(folder / "run"),
    }
    return ["finetune", str(recipe), *(f"{key}={value}" for key, value in settings.items()), *overrides]


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """Memory of a process while it ran.

    Attributes:
        samples: (time, anonymous bytes, resident bytes), in order.
    """

    samples: list[tuple[float, int, int]]

    def peak(self) -> dict[str, int]:
        """The peak of each kind over the whole run, bytes."""
        return {kind: self.between(0, time.time())[kind] for kind in ("anonymous", "resident")}

    def of(self, phase: dict[str, Any]) -> dict[str, Any]:
        """Peak memory of a phase of `run.json`, with its seconds."""
        return self.between(moment(phase["began"]), moment(phase["ended"])) | {"seconds": phase["seconds"]}

    def between(self, began: float, ended: float) -> dict[str, Any]:
        """Seconds, and the peak of each kind in bytes; if no sample lies between, that of the last one before."""
        samples = [sample for sample in self.samples if began <= sample[0] <= ended]
        samples = samples or [sample for sample in self.samples if sample[0] <= ended][-1:]
        return {
            "seconds": round(ended - began, 3),
            "anonymous": max((own for _, own, _ in samples), default=0),
            "resident": max((resident for _, _, resident in samples), default=0),
        }


def watch(command: Sequence[Any]) -> Watched:
    """Run a command in the repository's root to its end, and sample its memory.

    Raises:
        SystemExit: the command failed; with its exit code.
    """
    child = subprocess.Popen([str(part) for part in command], cwd=ROOT)
    samples: list[tuple[float, int, int]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_EVERY):
            fields = status(child.pid)
            if "RssAnon" in fields:  # a zombie has none
                samples.append((time.time(), fields["RssAnon"], fields["VmRSS"]))

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        code = child.wait()
    finally:
        done.set()
        watcher.join()
    if code:
        print(f"exit code {code}: {' '.join(map(str, command))}", file=sys.stderr)
        sys.exit(code)
    return Watched(samples)


def status(process: int) -> dict[str, int]:
    """Bytes of a process: all resident pages (VmRSS), and those without a file behind them (RssAnon)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon") if name in fields}


def moment(text: str) -> float:
    """A time of `run.json` in seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()


def machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    described = dict(
        [part.strip() for part in line.split(":", 1)]
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    )
    flags = described.get("flags", "").split()
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {
        "processor": described.get("model name", platform.machine()),
        "computes_bfloat16": "avx512_bf16" in flags or "amx_bf16" in flags,
        "cores": len(os.sched_getaffinity(0)),
        "memory": total,
    }


# --- output ----------------------------------------------------------------------------------------------------------


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for a terminal."""
    here, stored, peak = figures["machine"], figures["checkpoint"], figures["peak"]
    fast = "with" if here["computes_bfloat16"] else "without"
    told = [
        "",
        f"machine           {here['cores']} core(s) of {here['processor']}, {fast} bfloat16 arithmetic, "
        f"{format_bytes(here['memory'])}",
        f"checkpoint        {format_bytes(stored['bytes'])} in {stored['tensors']} tensors, the largest "
        f"{format_bytes(stored['largest'])}",
        f"loss              {figures['step']['loss']:.4f}, gradient norm {figures['step']['grad_norm']:.4f}, over "
        f"{figures['step']['supervised_tokens']} supervised tokens",
        f"adapter           {format_bytes(figures['adapter'])}",
        f"{'phase':<17} {'seconds':>9} {'own memory':>12} {'with mapped files':>18}",
    ]
    for name, phase in figures["phases"].items():
        memory = f"{format_bytes(phase['anonymous']):>12} {format_bytes(phase['resident']):>18}"
        told.append(f"{name:<17} {phase['seconds']:>9.1f} {memory}")
    memory = f"{format_bytes(peak['anonymous']):>12} {format_bytes(peak['resident']):>18}"
    told.append(f"{'the run':<17} {figures['seconds']:>9.1f} {memory}")
    kept = "kept" if peak["anonymous"] <= figures["limit"] else "EXCEEDED"
    told.append(f"limit             {format_bytes(figures['limit'])} of its own: {kept}")
    return told


if __name__ == "__main__":
    sys.exit(main())
