"""Figures for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune.serve.replier import Replier

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

GAUGES = {
    "waiting": ("finetune_waiting_requests", "Requests that are not in the batch"),
    "rows": ("finetune_batch_rows", "Replies in the batch"),
    "row_bound": ("finetune_batch_row_bound", "Most replies in the batch"),
    "token_bound": ("finetune_batch_token_bound", "Most tokens of the batch; lower where memory was short"),
}

COUNTERS = {
    "prompt_tokens": ("finetune_prompt_tokens", "Tokens of prompts that joined the batch"),
    "cached_tokens": ("finetune_cached_prompt_tokens", "Those of them that were not computed again"),
    "reply_tokens": ("finetune_reply_tokens", "Tokens of replies"),
    "pictures": ("finetune_pictures", "Pictures of requests that joined the batch"),
    "pictures_encoded": ("finetune_pictures_encoded", "Pictures that were encoded; features of others were kept"),
    "set_aside": ("finetune_requests_set_aside", "Requests begun anew for want of memory"),
}


class Metrics:
    """The figures of one server.

    Args:
        replier: whose state is part of them.

    Attributes:
        registry: of `prometheus_client`.
    """

    def __init__(self, replier: Replier) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_StateOf(replier))
        self._requests = Counter(
            "finetune_requests",
            "Requests for replies by status; 499: the client left",
            ["status"],
            registry=self.registry,
        )
        self._first_token = Histogram(
            "finetune_first_token_seconds",
            "From the arrival of a request to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._request_time = Histogram(
            "finetune_request_seconds",
            "From the arrival of a request to the end of its replies",
            buckets=SECONDS,
            registry=self.registry,
        )

    def count_request(self, status: int) -> None:
        """A request for replies was answered; of a stream that broke off, `status` is what it would have had."""
        self._requests.labels(str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """A request has its first token."""
        self._first_token.observe(seconds)

    def request_time(self, seconds: float) -> None:
        """All replies to a request have ended."""
        self._request_time.observe(seconds)


class _StateOf(Collector):
    def __init__(self, replier: Replier) -> None:
        self._replier = replier

    def collect(self) -> Iterator[Metric]:
        state = self._replier.state
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, getattr(state, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(state, field))
