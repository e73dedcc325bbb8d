"""The engine on the tiny model: failures in the middle of a forward change no other reply."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recipes_for_tests import TINY

from finetune.replies.sampling import GREEDY, Sampling
from finetune.serve.asked import Asked, ChoiceToken, Ended
from finetune.serve.engine import Engine
from finetune.serve.opened_model import open_served

DRAWN = Sampling(temperature=1.0, seed=11)
PROMPTS = [("One", GREEDY, 30), ("Two and more", DRAWN, 24), ("Three", GREEDY, 12), ("Four", DRAWN, 18)]


class Faults:
    """Lets chosen forwards of a model fail, halfway through its layers."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.calls = 0
        self.failing: dict[int, Exception] = {}
        layer.register_forward_pre_hook(self._before)

    def _before(self, *_: Any) -> None:
        self.calls += 1
        if self.calls in self.failing:
            raise self.failing[self.calls]


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any, Faults]:
    """The model, its name, and its faults."""
    model, names = open_served(str(TINY), style="chat", dtype="float32", prefix_bytes=0)
    return model, names.get("tiny"), Faults(model.decoder._forward.base.transformer.h[1])


@pytest.fixture
def engine(opened) -> Iterator[Engine]:
    running = Engine(opened[0])
    yield running
    running.close(0)


@pytest.fixture(scope="module")
def expected(opened) -> list[list[int | None]]:
    running = Engine(opened[0])
    found = replies(opened[1], running)
    running.close(0)
    return found


def replies(name: Any, engine: Engine) -> list[list[int | None]]:
    """The tokens of the replies to all prompts, asked at once."""
    takers: list[queue.Queue[Any]] = []
    asked = threading.Event()
    engine.run_between_steps(lambda: asked.wait(60))  # so that all join together
    for text, sampling, most in PROMPTS:
        takers.append(queue.Queue())
        ids = name.render([{"role": "user", "content": text}]).ids
        engine.submit(Asked(ids, most, name.stop_ids, sampling=sampling), takers[-1].put)
    asked.set()
    found = []
    for taker in takers:
        tokens = []
        while isinstance(event := taker.get(timeout=60), ChoiceToken):
            tokens.append(event.token.id)
        assert isinstance(event, Ended), event
        found.append(tokens)
    return found


@pytest.mark.parametrize(
    ("at", "kind"), [((3,), "memory"), ((12, 14, 15), "memory"), ((13,), "fault")], ids=["once", "thrice", "fault"]
)
def test_forwards_that_fail_change_no_reply(opened, engine, expected, at, kind):
    _, name, faults = opened
    error = torch.OutOfMemoryError("CUDA out of memory.") if kind == "memory" else RuntimeError("once")
    faults.failing = {faults.calls + call: error for call in at}
    assert replies(name, engine) == expected
    assert max(faults.failing) <= faults.calls, "they have failed"
    assert (engine.state.set_aside >= len(at)) == (kind == "memory")
