"""The pictures of requests through the vision tower, several together, each once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.serve.feature_cache import FeatureCache
from finetune.serve.picture_reading import Picture
from finetune.serve.work import Work

Encode = Callable[[torch.Tensor, str | None], torch.Tensor]
"""(images, 3, S, S) uint8 and the name of an adapter -> (images, n_queries, hidden)."""

Wanted = Mapping[str, Sequence[tuple[Work, Picture]]]
"""By key, which requests want a picture."""


@dataclass
class EncodingResult:
    """What became of pictures.

    Attributes:
        together: how many were encoded together.
        failed: requests with a picture that could not be encoded, and why.
        out_of_memory: a request whose picture did not fit; None where all did.
    """

    together: int = 0
    failed: list[tuple[Work, Exception]] = field(default_factory=list)
    out_of_memory: Work | None = None


class PictureEncoder:
    """Encodes pictures and keeps their features.

    Args:
        encode: the vision tower.
        cache: of features.

    Attributes:
        count: pictures that were encoded.
    """

    def __init__(self, encode: Encode, cache: FeatureCache) -> None:
        self._encode, self.cache = encode, cache
        self.count = 0

    def encode(self, group: Sequence[Work], most: int) -> EncodingResult:
        """Encode pictures of requests that are read and not encoded, in their order, of one adapter.

        Args:
            group: the requests.
            most: pictures.
        """
        wanted: dict[str, list[tuple[Work, Picture]]] = {}
        adapters: set[str | None] = set()
        for work in group:
            for picture in work.missing:
                picture.features = self.cache.get(picture.key)  # encoded since it was read
                if picture.features is None and adapters | {work.asked.adapter} == {work.asked.adapter}:
                    adapters.add(work.asked.adapter)
                    wanted.setdefault(picture.key, []).append((work, picture))
        together = dict(islice(wanted.items(), most))
        result = EncodingResult(len(together))
        if not together:
            return result
        try:
            if not self._encode_together(together):
                result.out_of_memory = next(iter(together.values()))[0][0]
        except Exception:
            # One of these is at fault.
            for key, own in together.items():
                try:
                    if not self._encode_together({key: own}):
                        result.together, result.out_of_memory = 1, own[0][0]
                except Exception as error:
                    result.failed += [(work, error) for work, _ in own]
        return result

    def _encode_together(self, wanted: Wanted) -> bool:
        """Encode pictures; False where memory does not hold that."""
        firsts = [own[0] for own in wanted.values()]
        pixels = [picture.pixels for _, picture in firsts if picture.pixels is not None]
        adapter = firsts[0][0].asked.adapter
        encoded = attempt(lambda: self._encode(torch.stack(pixels), adapter))
        if isinstance(encoded, OutOfMemory):
            return False
        self.count += len(wanted)
        for (key, own), features in zip(wanted.items(), encoded, strict=True):
            kept = features.clone()  # a view would keep the whole stack in memory
            self.cache.put(key, kept)
            for _, picture in own:
                picture.features, picture.pixels = kept, None
        return True
