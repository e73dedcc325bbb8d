"""Encoding a run's images before it trains: each distinct one once, and none that is in the cache already.

Loader workers decode, the device encodes, a thread writes. Each process of the run encodes a share of its images, and
finds those of the others in the cache. What was encoded stays when the run is killed.
"""

import contextlib
import math
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from finetune.batches.budget import ENCODED_TOGETHER
from finetune.batches.image_request import read_pixels
from finetune.data.loader_workers import ignore_signals_from_others
from finetune.data.row_progress import RowProgress
from finetune.data.sample import SHOWN_PROBLEMS
from finetune.errors import UserError
from finetune.memory.free_memory import free_host_memory
from finetune.model.computing import own_device
from finetune.quantities import format_bytes, format_count, format_duration
from finetune.recipe import Data
from finetune.replies.image_features import READERS
from finetune.vision_cache.cache import ImageHandles, VisionCache, cache_folder, content_key, preprocessing_of, settle
from finetune.vision_cache.run_images import Entry, RunImages, find_images
from finetune.vision_cache.store import FEATURES, Damaged, FeatureStore, Record
from finetune.vision_cache.tower_fingerprint import tower_fingerprint
from qwenvl import QwenVLForConditionalGeneration, QwenVLImageProcessor
from qwenvl.images.images import ImageError

Wanted = tuple[bytes, Entry]
"""An image to encode: its handle, and where the run has it."""


def encode_images(
    model: QwenVLForConditionalGeneration,
    images: RunImages,
    image_processor: QwenVLImageProcessor,
    data: Data,
    say: Callable[[str], None],
) -> VisionCache:
    """Encode what is not in the cache yet, on all processes of the run together.

    Args:
        model: without an adapter around it, its vision side frozen. That side is moved to this process's device.
        images: of the run; the same on all processes.
        data: of the recipe, with `vision_cache` memory or disk.
        say: prints a line; only the main process of a distributed run speaks.

    Returns:
        The cache, with what was there before; `complete` unless the bound left images out.

    Raises:
        UserError: images that cannot be read, all of them told; or no room on the disk or in memory.
        OSError: the disk fails. What was encoded until then stays.
        WorkerDied: a process of several ended by itself.
    """
    if data.vision_cache == "memory" and not hasattr(os, "memfd_create"):
        raise UserError(f"data.vision_cache: memory needs Linux, and this is {sys.platform}: set it to disk")
    device = torch.device(own_device()[""])
    model.transformer.visual.to(device).eval()  # its mode changes nothing in it: it has no dropout
    (run, *_) = _gather([secrets.token_hex(8)])
    handles = ImageHandles(preprocessing_of(image_processor), run)
    record = Record((model.config.n_queries, model.config.hidden_size), model.transformer.visual.proj.dtype)
    folder = None if data.vision_cache == "memory" else cache_folder() / tower_fingerprint(model, device)
    store = FeatureStore(folder, record)
    return _Encoding(model, images, image_processor, data, store, handles, device, say).run()


@dataclass
class _Encoding:
    model: QwenVLForConditionalGeneration
    images: RunImages
    image_processor: QwenVLImageProcessor
    data: Data
    store: FeatureStore
    handles: ImageHandles
    device: torch.device
    say: Callable[[str], None]
    encoded: int = 0
    found: int = 0

    def run(self) -> VisionCache:
        started, state = time.monotonic(), PartialState()
        local = _local_share(state)
        # Memory is shared by the processes of one machine only: each machine encodes all images.
        index, count = local if self.store.folder is None else (state.process_index, state.num_processes)
        wanted = self._find(state)
        self.store.refresh()
        damaged = self._forget_damaged([handle for handle, _ in wanted[index::count]])
        missing = [one for one in wanted[index::count] if not self.store.has(one[0])]
        all_missing = len(wanted) if self.store.folder is None else sum(_gather([len(missing)]))
        allowed = self._room(all_missing)
        self._say_plan(len(wanted), all_missing, allowed, damaged)
        self._encode(missing, allowed * len(missing) // max(all_missing, 1))
        self._share()
        if self.store.folder is not None and allowed == all_missing:
            # Machines whose folders are not one: what the others encoded is not here.
            absent = [one for one in wanted if not self.store.has(one[0])][local[0] :: local[1]]
            self._encode(absent, len(absent))
            self._share()
        self.store.keep_only(handle for handle, _ in wanted)
        absent = sum(1 for handle, _ in wanted if not self.store.has(handle))
        self._say_result(time.monotonic() - started, max(_gather([absent])))
        return VisionCache(self.store, self.handles, self.image_processor, not any(_gather([absent])))

    def _find(self, state: PartialState) -> list[Wanted]:
        """All distinct images, in the same order on every process; each looks at a share of the data."""
        found = find_images(
            self.images,
            self.handles,
            share=(state.process_index, state.num_processes),
            show_progress=state.is_main_process,
        )
        wanted: dict[bytes, Entry] = {}
        for handle, entry in sorted(_gather(list(found.items())), key=itemgetter(1)):
            wanted.setdefault(handle, entry)
        return list(wanted.items())

    def _forget_damaged(self, handles: Sequence[bytes]) -> list[str]:
        """Read all features that are there already; those that are damaged will be encoded anew."""
        known = list(dict.fromkeys(self.store.handles[handle] for handle in handles if self.store.has(handle)))
        problems = []
        with (
            ThreadPoolExecutor(READERS, "check-features") as readers,
            _progress("checking the vision cache", len(known)) as done,
        ):
            for content, problem in zip(known, readers.map(self._damage, known), strict=True):
                if problem is not None:
                    self.store.forget(content)
                    problems.append(problem)
                done(1)
        return _gather(problems)

    def _damage(self, content: bytes) -> str | None:
        try:
            self.store.read(content)
        except Damaged as error:
            return str(error)
        return None

    def _room(self, missing: int) -> int:
        """How many of the run's missing images may go into the cache; the same on all processes.

        Raises:
            UserError: there is not the room for that.
        """
        size, used, bound = self.store.record.nbytes, 0, self.data.vision_cache_gb
        if self.store.folder is None:
            free, where = free_host_memory(), "of memory"
            bound = free / 2 if bound is None else bound * 1e9
        else:
            place = cache_folder()
            existing = next(path for path in (place, *place.parents) if path.exists())
            free, where = shutil.disk_usage(existing).free, f"at {place}"
            used = sum(file.stat().st_size for file in place.glob(f"*/*{FEATURES}"))
            bound = math.inf if bound is None else bound * 1e9
        # Looked at by each process at another moment.
        free = min(_gather([free]))
        allowed = min(_gather([missing if bound == math.inf else min(missing, max(0, int((bound - used) // size)))]))
        if allowed * size > free:
            raise UserError(
                f"data.vision_cache: {self.data.vision_cache} needs {format_bytes(allowed * size)} {where} for "
                f"{allowed:,} images, and {format_bytes(free)} are free. Make room, or set data.vision_cache_gb: the "
                "images beyond it are encoded at each step"
                + ("" if self.store.folder is None else ". HF_HOME moves the folder to another disk")
            )
        return allowed

    def _say_plan(self, images: int, missing: int, allowed: int, damaged: Sequence[str]):
        size = format_bytes(missing * self.store.record.nbytes)
        where = "memory" if self.store.folder is None else self.store.folder
        plan = f"{missing:,} of {images:,} images to encode into {where} ({size})"
        self.say(f"{'vision':<11} {plan if missing else f'the features of {images:,} images are in {where}'}")
        if damaged:
            self.say(f"{'':<11} {len(damaged):,} are damaged there and encoded anew, such as {damaged[0]}")
        if allowed < missing:
            bound = self.data.vision_cache_gb
            limit = "half of the free memory" if bound is None else f"data.vision_cache_gb: {bound:g}"
            self.say(f"{'':<11} {allowed:,} of them fit into {limit}")

    def _say_result(self, seconds: float, left_out: int):
        encoded, found = (sum(_gather([count])) for count in (self.encoded, self.found))
        if encoded:
            rate = f"{format_count(encoded / max(seconds, 1e-9))} images/s"
            self.say(f"{'':<11} {encoded:,} images encoded in {format_duration(seconds)}, {rate}")
        if found:
            self.say(f"{'':<11} {found:,} were there under another name or an earlier date")
        if left_out:
            self.say(
                f"{'':<11} {left_out:,} are left out for the bound: they are encoded at each step, as without a cache"
            )

    def _encode(self, wanted: Sequence[Wanted], room: int):
        """Encode images into the store, until `room` of them are new there.

        Raises:
            UserError: on all processes, those that cannot be read on any of them.
        """
        problems: list[str] = []
        if wanted and room:
            with (
                _progress("encoding images", len(wanted)) as done,
                ThreadPoolExecutor(1, "write-features") as writer,
            ):
                written: list[Future[Any]] = []
                left = _Left(wanted, room, self.store, done)
                seen: set[bytes] = set()
                for group in self._loader(left):
                    problems += group.problems
                    new, known = [], []
                    for number, (_, content) in enumerate(group.entries):
                        (known if content in self.store.places or content in seen else new).append(number)
                        seen.add(content)
                    new = new[: left.room]
                    left.room -= len(new)
                    self.encoded, self.found = self.encoded + len(new), self.found + len(known)
                    features = self._features(group.pixels[new]) if new else None
                    # One at a time, and one ahead: what is encoded waits on the device.
                    for one in written:
                        one.result()
                    entries = ([group.entries[number] for number in numbers] for numbers in (new, known))
                    written = [writer.submit(self._write, features, *entries)]
                    done(len(group.entries) + len(group.problems))
                for one in written:
                    one.result()
        # Only when every process knows, so that none waits for another that has given up.
        if problems := _gather(problems):
            more = len(problems) - SHOWN_PROBLEMS
            lines = [*problems[:SHOWN_PROBLEMS], *([f"... and {more:,} more"] if more > 0 else [])]
            raise UserError("\n  ".join([f"{len(problems):,} images cannot be encoded:", *lines]))

    def _loader(self, left: "_Left") -> DataLoader:
        return DataLoader(
            _Pixels(self.images, self.handles, self.image_processor),
            batch_sampler=left,
            num_workers=self.data.workers,
            collate_fn=_together,
            worker_init_fn=ignore_signals_from_others,
            pin_memory=self.device.type == "cuda",
            # A generator of its own: the training's numbers are drawn as if this had not been.
            generator=torch.Generator(),
        )

    @torch.no_grad()
    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(images, 3, S, S) uint8 -> (images, n_queries, hidden).

        Always of `ENCODED_TOGETHER` images, filled up with one of them: how a product is summed up follows from its
        shape, and so an image's features do not depend on how many others it came with.
        """
        filled = torch.cat([pixels, pixels[:1].expand(ENCODED_TOGETHER - len(pixels), -1, -1, -1)])
        return self.model.get_image_features(filled.to(self.device, non_blocking=True))[: len(pixels)]

    def _write(self, features: torch.Tensor | None, new: list[tuple[bytes, bytes]], known: list[tuple[bytes, bytes]]):
        if features is not None:
            self.store.add(new, features)
        self.store.name(known)

    def _share(self):
        """Learn of what the other processes have encoded."""
        if self.store.folder is not None:
            PartialState().wait_for_everyone()
            self.store.refresh()
            return
        own = self.store.own_segment()
        for machine, *segment in _gather([(socket.gethostname(), *own)] if own is not None else []):
            if machine == socket.gethostname():
                self.store.adopt(*segment)


class _Read(NamedTuple):
    """A decoded image, (3, S, S) uint8; or in its place why there is none."""

    handle: bytes
    pixels: torch.Tensor | None
    problem: str | None


class _Group(NamedTuple):
    """Decoded images: (handle, content) of each, and (images, 3, S, S) uint8; and what is wrong with others."""

    entries: list[tuple[bytes, bytes]]
    pixels: torch.Tensor | None
    problems: list[str]


@dataclass
class _Pixels(Dataset):
    """Decodes wanted images; in loader workers."""

    images: RunImages
    handles: ImageHandles
    image_processor: QwenVLImageProcessor

    def __getitem__(self, wanted: Wanted) -> _Read:
        handle, entry = wanted
        request = self.images.request(entry)
        settle(request.source, request.access)
        try:
            pixels = read_pixels(request, self.image_processor)
        except ImageError as error:
            return _Read(handle, None, str(error))
        if self.handles.of(request.source, request.access) != handle:
            return _Read(handle, None, f"{request.name}: it was changed while the run began")
        return _Read(handle, pixels, None)


def _together(read: Sequence[_Read]) -> _Group:
    good = [one for one in read if one.pixels is not None]
    return _Group(
        [(one.handle, content_key(one.pixels)) for one in good],
        torch.stack([one.pixels for one in good]) if good else None,
        [one.problem for one in read if one.problem is not None],
    )


@dataclass
class _Left:
    """Wanted images in groups as long as there is room, without those that another run has encoded meanwhile.

    Runs of the same data begin at different places, so that they share the work until they meet.

    Attributes: `room` for so many new ones, which who encodes them counts; `done` is told of those that are there.
    """

    wanted: Sequence[Wanted]
    room: int
    store: FeatureStore
    done: Callable[[int], None]

    def __iter__(self) -> Iterator[list[Wanted]]:
        starts = list(range(0, len(self.wanted), ENCODED_TOGETHER))
        first = secrets.randbelow(len(starts))
        for start in starts[first:] + starts[:first]:
            if self.room <= 0:
                return
            self.store.refresh()
            group = self.wanted[start : start + ENCODED_TOGETHER]
            left = [one for one in group if not self.store.has(one[0])]
            self.done(len(group) - len(left))
            if left:
                yield left


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shown by the main process, of its share."""
    if not PartialState().is_main_process:
        yield lambda images: None
        return
    with RowProgress(what, total, unit="images") as progress:
        yield progress.add


def _local_share(state: PartialState) -> tuple[int, int]:
    """Which of this machine's processes this one is, and of how many; each by itself where the launcher is silent."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (state.local_process_index if count > 1 else 0), count


def _gather(values: list[Any]) -> list[Any]:
    """The values of all processes, in their order."""
    return gather_object(values) if PartialState().num_processes > 1 else values
