"""Measure loading a checkpoint in 4 bits: seconds, peak memory, and the size of the loaded model.

    python examples/benchmark_nf4_load.py --checkpoint Qwen-VL-Chat
    python examples/benchmark_nf4_load.py --make random-small --layers 4 --vision-layers 4
    python examples/benchmark_nf4_load.py --make random-full --quantize language vision head

`--make` first writes a checkpoint of that many layers with random weights, in the published layout (`.bin` files,
bfloat16); the full one takes 19.3 GB of disk. Time and memory do not depend on the values.

Two kinds of memory are measured, which needs Linux: the process's own (anonymous), and all resident pages, which
include mapped pages of the checkpoint's files that the system can reclaim.
"""

import argparse
import shutil
import threading
import time
from pathlib import Path
from typing import Self

import torch
from make_random_checkpoint import random_config, write_weights

from finetune.quantities import format_bytes
from qwenvl import InputError, load_model
from qwenvl.checkpoint.checkpoint_files import stored_tensors
from qwenvl.model.quantization import DEFAULT_PARTS, PARTS

GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="folder or hub id")
    source.add_argument("--make", type=Path, help="folder to write a random checkpoint into; must not exist")
    parser.add_argument("--layers", type=int, default=32, help="of the language model written")
    parser.add_argument("--vision-layers", type=int, default=48, help="of the vision transformer written")
    parser.add_argument("--remove", action="store_true", help="remove the written checkpoint afterwards")
    parser.add_argument("--quantize", nargs="+", choices=PARTS, default=DEFAULT_PARTS, help="parts in 4 bits")
    parser.add_argument("--embeddings-on-cpu", action="store_true", help="keep the embeddings in host memory")
    parser.add_argument("--dtype", default="auto", help="of weights that are not in 4 bits")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default the GPU if there is one")
    arguments = parser.parse_args()
    if arguments.make:
        if arguments.make.exists():
            parser.error(f"--make: {arguments.make} exists; give another folder")
        make(arguments.make, arguments.layers, arguments.vision_layers)
    try:
        measure(arguments.checkpoint or str(arguments.make), arguments)
    except InputError as error:
        parser.error(str(error))
    finally:
        if arguments.make and arguments.remove:
            shutil.rmtree(arguments.make)


def make(folder: Path, layers: int, vision_layers: int) -> None:
    """Write a checkpoint with random weights, without a vocabulary."""
    folder.mkdir(parents=True)
    config = random_config(layers, vision_layers)
    config.save_pretrained(folder)
    write_weights(config, folder, seed=0)


def measure(checkpoint: str, arguments: argparse.Namespace) -> None:
    """Load the checkpoint and print what it took."""
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in stored_tensors(checkpoint)]
    before = memory()
    with PeakMemory() as peak:
        started = time.monotonic()
        model = load_model(
            checkpoint,
            quantization="nf4",
            quantize=arguments.quantize,
            embeddings_on_cpu=arguments.embeddings_on_cpu,
            dtype=arguments.dtype,
            device_map=arguments.device,
        )
        seconds = time.monotonic() - started
    final = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    print(f"checkpoint        {format_bytes(sum(sizes))}, largest tensor {format_bytes(max(sizes))}")
    print(f"in 4 bits         {', '.join(arguments.quantize)}; on {model.device}, {torch.get_num_threads()} threads")
    print(f"loaded in         {seconds:.1f} s")
    print(f"final size        {format_bytes(final)}")
    print(f"peak, anonymous   {format_bytes(peak.anonymous - before['RssAnon'])} above the start")
    print(f"peak, all pages   {format_bytes(peak.resident - before['VmRSS'])} above the start, mapped files included")
    print(f"limit             {format_bytes(final + max(sizes) + GB)} (final size + largest tensor + 1 GB)")
    if torch.cuda.is_available():
        print(f"peak on the GPU   {format_bytes(torch.cuda.max_memory_allocated())}")


class PeakMemory:
    """Peak memory of this process in a `with` block, sampled every 10 ms: `anonymous` and `resident`, bytes."""

    def __enter__(self) -> Self:
        self.anonymous = self.resident = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            now = memory()
            self.anonymous = max(self.anonymous, now["RssAnon"])
            self.resident = max(self.resident, now["VmRSS"])


def memory() -> dict[str, int]:
    """Bytes of this process: all resident pages (VmRSS), and those without a file behind them (RssAnon)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}


if __name__ == "__main__":
    main()
