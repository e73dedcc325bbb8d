"""Features of images that were encoded, so that an image that is asked about again is not encoded again."""

import threading
from collections import OrderedDict

import torch


class FeatureCache:
    """Features by key: the least recently used are dropped. From any thread.

    Args:
        most_bytes: of all features together; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._bytes = 0
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Of the features that are kept."""
        return self._bytes

    def get(self, key: str) -> torch.Tensor | None:
        """(n_queries, hidden), which are then the most recently used; None where they are not kept."""
        with self._lock:
            found = self._features.get(key)
            if found is not None:
                self._features.move_to_end(key)
            return found

    def put(self, key: str, features: torch.Tensor) -> None:
        """Keep (n_queries, hidden) features, which are no view of something larger."""
        with self._lock:
            if key in self._features or features.nbytes > self.most_bytes:
                return
            self._features[key] = features
            self._bytes += features.nbytes
            while self._bytes > self.most_bytes:
                _, dropped = self._features.popitem(last=False)
                self._bytes -= dropped.nbytes

    def clear(self) -> bool:
        """Drop all; whether there were any."""
        with self._lock:
            had = bool(self._features)
            self._features.clear()
            self._bytes = 0
            return had
