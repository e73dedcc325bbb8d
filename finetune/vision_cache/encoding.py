"""Encode a run's images before it trains: each distinct image once, and none that is in the cache already.

Loader workers decode, the device encodes, a thread writes. Each process of the run encodes a share of the images and
reads the other shares from the cache. Features that were encoded stay in the cache when the run is killed.
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
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from finetune.batches.budget import ENCODED_TOGETHER
from finetune.data.loader_workers import ignore_signals_from_others
from finetune.data.row_progress import RowProgress
from finetune.data.sample import SHOWN_PROBLEMS
from finetune.errors import UserError
from finetune.memory.free_memory import free_host_memory
from finetune.model.computing import own_device
from finetune.quantities import format_bytes, format_count, format_duration
from finetune.recipe import Data
from finetune.replies.image_features import READERS
from finetune.run.left_out import LEFT_OUT, LeftOut
from finetune.terminal import Say, say
from finetune.vision_cache.cache import ImageHandles, VisionCache, cache_folder, preprocessing_of
from finetune.vision_cache.image_groups import LeftGroups, Wanted, WantedPixels, together
from finetune.vision_cache.run_images import Entry, RunImages, find_images
from finetune.vision_cache.store import FEATURES, Damaged, FeatureStore, Record
from finetune.vision_cache.tower_fingerprint import tower_fingerprint
from qwenvl import QwenVLForConditionalGeneration, QwenVLImageProcessor


def encode_images(
    model: QwenVLForConditionalGeneration,
    images: RunImages,
    image_processor: QwenVLImageProcessor,
    data: Data,
    say: Say = say,
    left_out: LeftOut | None = None,
) -> VisionCache:
    """Encode the images that are not in the cache yet, in all processes of the run together.

    Args:
        model: without an adapter around it, its vision side frozen. The vision side is moved to this process's device.
        images: of the run; the same in all processes.
        data: of the recipe, with `vision_cache` memory or disk.
        say: prints a labelled line; `say_nothing` in all processes but the main one.
        left_out: notes the samples of images that cannot be read, where it skips them; None refuses such images.

    Returns:
        The cache, with images that were there before; `complete` unless the bound left images out. Images that cannot
        be read are in no cache, and no sample with one is used.

    Raises:
        UserError: images that cannot be read and are not skipped (all are listed), no room on the disk or in memory,
            or a disk that fails (`PathError`). Features that were written until then stay.
        WorkerDied: a worker process ended unexpectedly.
    """
    if data.vision_cache == "memory" and not hasattr(os, "memfd_create"):
        raise UserError(f"data.vision_cache: memory needs Linux, and this is {sys.platform}: set it to disk")
    device = torch.device(own_device()[""])
    model.transformer.visual.to(device).eval()  # the mode makes no difference: it has no dropout
    (run, *_) = _gather([secrets.token_hex(8)])
    handles = ImageHandles(preprocessing_of(image_processor), run)
    record = Record((model.config.n_queries, model.config.hidden_size), model.transformer.visual.proj.dtype)
    folder = None if data.vision_cache == "memory" else cache_folder() / tower_fingerprint(model, device)
    store = FeatureStore(folder, record)
    left_out = left_out or LeftOut(None, "error")
    return _Encoding(model, images, image_processor, data, store, handles, device, say, left_out).run()


@dataclass
class _Encoding:
    """One process's part of the phase.

    Attributes:
        encoded: images that were encoded here.
        found: images whose pixels were in the cache under another handle.
        unreadable: handles of the images that cannot be read, of all processes.
    """

    model: QwenVLForConditionalGeneration
    images: RunImages
    image_processor: QwenVLImageProcessor
    data: Data
    store: FeatureStore
    handles: ImageHandles
    device: torch.device
    say: Say
    left_out: LeftOut
    encoded: int = 0
    found: int = 0
    unreadable: set[bytes] = field(default_factory=set)

    def run(self) -> VisionCache:
        started, state = time.monotonic(), PartialState()
        local = _local_share(state)
        # Only processes of one machine share memory: with a store in memory each machine encodes all images.
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
            # Machines without a shared file system: images that the others encoded are not in this one's folder.
            absent = [one for one in self._readable(wanted) if not self.store.has(one[0])][local[0] :: local[1]]
            self._encode(absent, len(absent))
            self._share()
        self.store.keep_only(handle for handle, _ in wanted)
        beyond = sum(1 for handle, _ in self._readable(wanted) if not self.store.has(handle))
        left_out = max(_gather([beyond]))
        self._say_result(time.monotonic() - started, left_out)
        return VisionCache(self.store, self.handles, self.image_processor, complete=left_out == 0)

    def _readable(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        return [one for one in wanted if one[0] not in self.unreadable]

    def _find(self, state: PartialState) -> list[Wanted]:
        """All distinct images, in the same order in every process; each process looks at a share of the data."""
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
        """Read the features that are in the cache already and drop damaged ones, which are then encoded again.

        Returns:
            What is wrong with each damaged record, of all processes.
        """
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
        """How many of the run's missing images the bound allows into the cache; the same in all processes.

        Raises:
            UserError: there is no room for them.
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
        # Each process measures at another moment.
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

    def _say_plan(self, images: int, missing: int, allowed: int, damaged: Sequence[str]) -> None:
        size = format_bytes(missing * self.store.record.nbytes)
        where = "memory" if self.store.folder is None else self.store.folder
        plan = f"{missing:,} of {images:,} images to encode into {where} ({size})"
        self.say("vision", plan if missing else f"the features of {images:,} images are in {where}")
        if damaged:
            self.say("", f"{len(damaged):,} are damaged there and encoded again, such as {damaged[0]}")
        if allowed < missing:
            bound = self.data.vision_cache_gb
            limit = "half of the free memory" if bound is None else f"data.vision_cache_gb: {bound:g}"
            self.say("", f"{allowed:,} of them fit into {limit}")

    def _say_result(self, seconds: float, left_out: int) -> None:
        encoded, found = (sum(_gather([count])) for count in (self.encoded, self.found))
        if encoded:
            rate = f"{format_count(encoded / max(seconds, 1e-9))} images/s"
            self.say("", f"{encoded:,} images encoded in {format_duration(seconds)}, {rate}")
        if found:
            self.say("", f"{found:,} were there under another name or an earlier date")
        if left_out:
            self.say("", f"{left_out:,} are left out for the bound: they are encoded at each step, as without a cache")

    def _encode(self, wanted: Sequence[Wanted], room: int) -> None:
        """Encode images into the store, until `room` new ones are in it.

        Raises:
            UserError: images that cannot be read; in all processes, with the images of all.
        """
        problems: list[str] = []
        unreadable: dict[bytes, str] = {}
        if wanted and room:
            with (
                _progress("encoding images", len(wanted)) as done,
                ThreadPoolExecutor(1, "write-features") as writer,
            ):
                written: list[Future[Any]] = []
                left = LeftGroups(wanted, room, self.store, done)
                seen: set[bytes] = set()
                for group in self._loader(left):
                    problems += group.problems
                    unreadable |= group.unreadable
                    new: list[int] = []
                    known: list[int] = []
                    for number, (_, content) in enumerate(group.entries):
                        (known if content in self.store.places or content in seen else new).append(number)
                        seen.add(content)
                    new = new[: left.room]
                    left.room -= len(new)
                    self.encoded, self.found = self.encoded + len(new), self.found + len(known)
                    features = self._features(group.pixels[new]) if new else None
                    # Writes are one group behind: more would keep more features on the device.
                    for one in written:
                        one.result()
                    entries = ([group.entries[number] for number in numbers] for numbers in (new, known))
                    written = [writer.submit(self._write, features, *entries)]
                    done(len(group.entries) + len(group.problems) + len(group.unreadable))
                for one in written:
                    one.result()
        if self.left_out.on_bad_row == "skip":
            self._leave_out(wanted, unreadable)
        else:
            problems += unreadable.values()
        # Raised in all processes together: none is left waiting in a collective operation.
        if problems := _gather(problems):
            more = len(problems) - SHOWN_PROBLEMS
            lines = [*problems[:SHOWN_PROBLEMS], *([f"... and {more:,} more"] if more > 0 else [])]
            raise UserError("\n  ".join([f"{len(problems):,} images cannot be encoded:", *lines]))

    def _leave_out(self, wanted: Sequence[Wanted], unreadable: dict[bytes, str]) -> None:
        """Note the first sample of each image that cannot be read; the others are noted when they are met."""
        for handle, (index, _) in wanted:
            if handle in unreadable:
                self.left_out.meet(*self.images.sample(index), unreadable[handle])
        self.unreadable |= set(_gather(list(unreadable)))
        if self.unreadable:
            self.say("", f"{len(self.unreadable):,} images cannot be read: their samples are left out, see {LEFT_OUT}")

    def _loader(self, left: LeftGroups) -> DataLoader:
        return DataLoader(
            WantedPixels(self.images, self.handles, self.image_processor),
            batch_sampler=left,
            num_workers=self.data.workers,
            collate_fn=together,
            worker_init_fn=ignore_signals_from_others,
            pin_memory=self.device.type == "cuda",
            # A separate generator leaves the random numbers of the training as they are without a cache.
            generator=torch.Generator(),
        )

    @torch.no_grad()
    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(images, 3, S, S) uint8 -> (images, n_queries, hidden).

        Batches are padded to `ENCODED_TOGETHER` images with the first one: kernels sum in an order that depends on the
        shape, and so features do not depend on how many images are encoded with them.
        """
        filled = torch.cat([pixels, pixels[:1].expand(ENCODED_TOGETHER - len(pixels), -1, -1, -1)])
        return self.model.get_image_features(filled.to(self.device, non_blocking=True))[: len(pixels)]

    def _write(
        self, features: torch.Tensor | None, new: list[tuple[bytes, bytes]], known: list[tuple[bytes, bytes]]
    ) -> None:
        if features is not None:
            self.store.add(new, features)
        self.store.name(known)

    def _share(self) -> None:
        """Read what the other processes have encoded."""
        if self.store.folder is not None:
            PartialState().wait_for_everyone()
            self.store.refresh()
            return
        own = self.store.own_segment()
        for machine, *segment in _gather([(socket.gethostname(), *own)] if own is not None else []):
            if machine == socket.gethostname():
                self.store.adopt(*segment)


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, in the main process, over its share."""
    if not PartialState().is_main_process:
        yield lambda images: None
        return
    with RowProgress(what, total, unit="images") as progress:
        yield progress.add


def _local_share(state: PartialState) -> tuple[int, int]:
    """(index, count) of this process among those of its machine; (0, 1) if the launcher does not tell."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (state.local_process_index if count > 1 else 0), count


def _gather(values: list[Any]) -> list[Any]:
    """The values of all processes, in their order."""
    return gather_object(values) if PartialState().num_processes > 1 else values
