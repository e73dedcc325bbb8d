"""The names that are served, and adapters that are loaded and dropped while requests run."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from finetune.errors import UserError
from finetune.replies.model_style import ModelUse
from finetune.serve.asked_name import Asking, as_asked, use_of_adapter
from finetune.serve.served_name import ServedName
from qwenvl import QwenVLTokenizer
from qwenvl.base_check import check_base
from qwenvl.loading import AdapterReading, read_adapter

T = TypeVar("T")


class BetweenSteps(Protocol):
    """Runs work where the model is not in use: `Engine.run_between_steps`."""

    def __call__(self, work: Callable[[], T], /) -> "Future[T]": ...


def at_once(work: Callable[[], T], /) -> "Future[T]":
    """Run work here and now: where nothing else uses the model."""
    future: Future[T] = Future()
    future.set_result(work())
    return future


class AdapterHolder(Protocol):
    """Has the adapters of the model; `finetune.serve.adapters.ModelAdapters`."""

    def add(self, folder: str, reading: AdapterReading) -> str: ...

    def remove(self, name: str) -> None: ...


class ServedNames:
    """The names that are served, for several threads.

    A request leases its name from when it is rendered until it has ended: `with names.lease("contracts") as served`.
    A name that is dropped is gone for new requests at once; its adapter leaves the model when the last of its requests
    has ended. An adapter that is loaded later under the same name is another one for the engine, so that nothing kept
    of the first is used for it.

    Args:
        base: checkpoint of the model: folder or hub id.
        quantized: its parts in 4 bits.
        tokenizer: of the model.
        asking: how all names are asked.
        adapters: of the model; None where adapters cannot be loaded.
        no_adapters: why they cannot.
    """

    def __init__(
        self,
        base: str,
        quantized: tuple[str, ...],
        tokenizer: QwenVLTokenizer,
        asking: Asking,
        adapters: AdapterHolder | None = None,
        *,
        no_adapters: str = "adapters cannot be loaded here",
    ) -> None:
        self._base, self._quantized, self._tokenizer = base, quantized, tokenizer
        self._asking, self._adapters, self._no_adapters = asking, adapters, no_adapters
        self._lock = threading.Lock()
        self._names: dict[str, _Held] = {}
        self._loading: set[str] = set()

    def __iter__(self) -> Iterator[ServedName]:
        """All names, in the order in which they were loaded."""
        with self._lock:
            return iter([held.served for held in self._names.values()])

    def get(self, name: str) -> ServedName | None:
        """What is served under a name; None where there is no such name."""
        with self._lock:
            held = self._names.get(name)
            return None if held is None else held.served

    @contextmanager
    def lease(self, name: str) -> Iterator[ServedName]:
        """What is served under a name, which stays loaded within.

        Raises:
            UnknownName: there is none.
        """
        with self._lock:
            held = self._names.get(name)
            if held is None:
                raise UnknownName(name, list(self._names))
            held.leases += 1
        try:
            yield held.served
        finally:
            with self._lock:
                held.leases -= 1
                remove = held.remove if held.leases == 0 else None
            if remove is not None:
                remove()

    def put(
        self,
        use: ModelUse,
        name: str,
        adapter: str | None,
        *,
        stop_ids: tuple[int, ...] | None = None,
        notes: tuple[str, ...] = (),
    ) -> ServedName:
        """Serve what is in the model already.

        Args:
            use: how it is asked.
            name: as clients call it.
            adapter: what the decoder calls its adapter; None for the model without one.
            stop_ids: tokens that end a reply; None where the checkpoint's own settings say them.
            notes: what is to be said of it beside how it is asked.

        Raises:
            UserError: the name is taken or is none, or it cannot be asked as the command says.
        """
        served = as_asked(use, name, adapter, self._tokenizer, self._asking)
        served = replace(served, stop_ids=stop_ids or served.stop_ids, notes=(*served.notes, *notes))
        with self._lock:
            self._require_free(name)
            self._names[name] = _Held(served)
        return served

    def check(self, name: str, folder: str) -> ModelUse:
        """Check an adapter before it is loaded, but for its weights: that it is one, on this base, in the same form.

        Raises:
            InputError: it is not; or the name is taken or is none.
        """
        with self._lock:
            self._require_free(name)
        if self._adapters is None:
            raise UserError(f"{folder}: {self._no_adapters}")
        use = use_of_adapter(folder, self._base, self._quantized, self._asking)
        as_asked(use, name, None, self._tokenizer, self._asking)
        return use

    def load(
        self, name: str, folder: str, between_steps: BetweenSteps = at_once, *, notes: Sequence[str] = ()
    ) -> ServedName:
        """Load an adapter, and serve it.

        Args:
            name: as clients call it.
            folder: adapter or run folder, or hub id.
            between_steps: runs what changes the model; what takes long, such as the check of the base, is done before.
            notes: more to say of it.

        Raises:
            InputError: as `check`, or the adapter's weights are damaged or do not fit; nothing has changed then.
        """
        use = self.check(name, folder)
        assert self._adapters is not None and use.source.adapter is not None, "checked"
        adapters, place = self._adapters, use.source.adapter
        reading = read_adapter(place)
        check_base(place, self._base, page_cache=True, cached=True)
        with self._lock:
            self._require_free(name)
            self._loading.add(name)
        try:
            adapter = between_steps(lambda: adapters.add(place, reading)).result()
            served = as_asked(use, name, adapter, self._tokenizer, self._asking)
            served = replace(served, notes=(*served.notes, *notes))
            with self._lock:
                self._names[name] = _Held(served)
        finally:
            with self._lock:
                self._loading.discard(name)
        return served

    def drop(self, name: str, between_steps: BetweenSteps = at_once) -> None:
        """Serve an adapter no longer. Requests that have it are finished; then its weights leave the model.

        Args:
            between_steps: runs what changes the model; may be called later, when the last request has ended.

        Raises:
            UnknownName: there is none.
            UserError: it is the model itself.
        """
        with self._lock:
            held = self._names.get(name)
            if held is None:
                raise UnknownName(name, list(self._names))
            adapters, adapter = self._adapters, held.served.adapter
            if adapter is None or adapters is None:
                raise UserError(f"{name} is the model itself, which cannot be unloaded while it is served")
            del self._names[name]

            def remove() -> "Future[None]":
                return between_steps(lambda: adapters.remove(adapter))

            if held.leases:
                held.remove = remove
                return
        remove().result()

    def _require_free(self, name: str) -> None:
        if name in self._names or name in self._loading:
            raise NameTaken(f"{name} is served already: unload it first, or give another name")


class NameTaken(UserError):
    """Something is served under the name already."""


class UnknownName(UserError):
    """Nothing is served under the name that a request gives.

    Attributes:
        name: that was asked for.
    """

    def __init__(self, name: str, names: list[str]):
        super().__init__(f"there is no model {name!r} here, but {', '.join(names) or 'none'}")
        self.name = name


@dataclass
class _Held:
    """A name, how many requests have it, and what to do when none has: None while it is served."""

    served: ServedName
    leases: int = 0
    remove: Callable[[], object] | None = None
