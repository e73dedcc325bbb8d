"""Count the bytes of live tensors after each operation, of real tensors and on the meta device alike.

    with LiveBytes() as counted:
        loss = model(...)
        counted.stage = "backward"
        loss.backward()
    counted.fullest["backward"].total

Operations on the meta device make shapes without values, so a step of a model of any size runs there in a second.
The control flow of a step depends on integers: ids, positions, which tokens are trained. Those stay real: integer
tensors that would be created on the meta device, or moved there, are created on the CPU.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
META = torch.device("meta")
OWN = "own"
"""The key of an operation's own workspace among the bytes held at a moment."""


@dataclass
class Moment:
    """The moment of a stage at which most bytes are held.

    Attributes:
        held: bytes by the stage that allocated them, and `OWN`.
        total: their sum.
    """

    held: Counter[str] = field(default_factory=Counter)
    total: int = 0


class LiveBytes(TorchDispatchMode):
    """Counts storages that are allocated inside it, for as long as they live.

    A storage counts once, however many views of it there are; those from before (weights, inputs) do not count. A
    kernel's internal workspace is invisible to PyTorch's dispatcher: `own` tells its size where it is known.

    Args:
        own: bytes of an operation's workspace, by the operation and its arguments.

    Attributes:
        stage: to be set as the work goes on; new storages are counted under it.
        live: bytes held now, by the stage that allocated them.
        fullest: of each stage, the moment at which most was held.
    """

    def __init__(self, own: Callable[[Any, tuple[Any, ...]], int] = lambda operation, arguments: 0) -> None:
        super().__init__()
        self._own = own
        self._forget: dict[int, Callable[[], None]] = {}
        self._total = 0
        self.stage = ""
        self.live: Counter[str] = Counter()
        self.fullest: dict[str, Moment] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        if kwargs.get("device") == META or any(tensor.is_meta for tensor in given):
            result = _without_values(func, given, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if own := self._own(func, args):
            self._note(own)
        there_before = None
        for tensor in _tensors((result,)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._forget:
                continue
            if there_before is None:
                there_before = {one.untyped_storage()._cdata for one in given}
            if key not in there_before:
                self._count(storage, key)
        return result

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Stop counting a tensor that stands for one elsewhere, such as in host memory."""
        forget = self._forget.get(tensor.untyped_storage()._cdata)
        if forget is not None:
            forget()

    def _count(self, storage: torch.UntypedStorage, key: int) -> None:
        size, stage = storage.nbytes(), self.stage
        if not size:
            return

        def forget() -> None:
            if self._forget.get(key) is forget:
                del self._forget[key]
                self.live[stage] -= size
                self._total -= size

        self._forget[key] = forget
        weakref.finalize(storage, forget).atexit = False
        self.live[stage] += size
        self._total += size
        self._note(0)

    def _note(self, own: int) -> None:
        moment = self.fullest.setdefault(self.stage, Moment())
        if self._total + own > moment.total:
            moment.total = self._total + own
            moment.held = self.live.copy()
            moment.held[OWN] += own


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _without_values(func: Any, given: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that has or gives tensors on the meta device; integers it creates are real, on the CPU."""
    if any(tensor.is_meta for tensor in given):
        if func is aten._to_copy.default and kwargs.get("dtype", args[0].dtype) == args[0].dtype:
            return aten.alias.default(args[0])  # a move between devices, which are one here
        if not all(tensor.is_meta for tensor in given):
            args, kwargs = tree_map(_shape, args), tree_map(_shape, kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": META}
        made = _made_before(func, args, kwargs)
        return _make(func, args, kwargs) if made is None else made
    dtype = kwargs.get("dtype") or (given[0].dtype if given else None)
    if dtype is None and func._schema.name == "aten::arange" and all(isinstance(arg, int) for arg in args):
        dtype = torch.int64
    if dtype is not None and not dtype.is_floating_point:
        return func(*args, **{**kwargs, "device": torch.device("cpu")})
    return func(*args, **kwargs)


# Shape inference in Python is what takes longest here, and layers repeat the same operations: results are cached.
_MADE: dict[tuple[Any, ...], tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]] = {}
_MOST_MADE = 20_000


def _made_before(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, ...] | torch.Tensor | None:
    """New tensors of the shapes that the operation gave for arguments like these; None if they are not cached."""
    like = _MADE.get((func, _like(args), _like(tuple(kwargs.items()))))
    if like is None:
        return None
    made = tuple(torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in like)
    return made[0] if len(made) == 1 else made


def _make(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the operation, and cache its shapes unless it gives views or writes in place."""
    key = (func, _like(args), _like(tuple(kwargs.items())))
    result = func(*args, **kwargs)
    made = result if isinstance(result, tuple) else (result,)
    if all(isinstance(one, torch.Tensor) and one.is_meta for one in made):
        before = {one.untyped_storage()._cdata for one in _tensors((*args, *kwargs.values()))}
        storages = {one.untyped_storage()._cdata for one in made}
        if not before & storages and len(storages) == len(made) and not func._schema.is_mutable:
            if len(_MADE) >= _MOST_MADE:
                _MADE.clear()
            _MADE[key] = tuple((tuple(one.shape), one.stride(), one.dtype) for one in made)
    return result


def _like(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        return values.shape, values.stride(), values.dtype
    # With the type: 1, 1.0 and True are equal but give different results.
    return tuple(map(_like, values)) if isinstance(values, tuple | list) else (type(values), values)


def _shape(value: Any) -> Any:
    return value.to(META) if isinstance(value, torch.Tensor) and not value.is_meta else value
