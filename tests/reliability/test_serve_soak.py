"""Many small requests to a server that runs, and clients that are no good: nothing is lost, and nothing grows.

    python tests/reliability/test_serve_soak.py 10000

Of a hundred requests 5 are broken, of 6 the client leaves before the end of its reply, and 4 read slowly. Every other
one has to have the text that the model's own `generate` gives; a sampled one that of the same request asked alone.
"""

import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parents[2])]

from recipes_for_tests import TINY
from soak_client import Answer, Connection

from finetune.replies.reply_text import reply_text
from qwenvl import load_model, load_processor

WORKERS = 24
IMAGES = 12
PROMPTS = 48
FIRST_TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
NEAR = 1e-3
"""Of two logits."""
MAX_BODY = 1_000_000
MAX_LENGTH = 640
GROWTH_MB = 30
"""Of resident memory in the second half of the requests."""


@dataclass(frozen=True)
class Prompt:
    """A request, and the texts that it has to be answered with, by choice."""

    body: dict
    texts: dict[int, str]


@dataclass
class Counts:
    """What came of the requests."""

    answered: int = 0
    refused: Counter = field(default_factory=Counter)
    left: int = 0
    wrong: list[str] = field(default_factory=list)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((60, 40)).save(file, "PNG")
    return file.getvalue()


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def image_part(image: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


@torch.inference_mode()
def greedy_prompts(draw: random.Random) -> list[Prompt]:
    """Requests of several forms, with what `generate` replies to each by itself."""
    model, processor = load_model(TINY, dtype=torch.float32).eval(), load_processor(TINY)
    tokenizer = processor.tokenizer
    stops = [tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id]
    prompts = []
    for number in range(PROMPTS):
        images = [png((number + one) % IMAGES) for one in range(draw.choice([0, 0, 0, 1, 1, 2]))]
        text = f"{number}: " + " ".join(draw.choice(["what", "is", "the", "total", "of", "42"]) for _ in range(8))
        turns = (
            [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}] if number % 5 == 0 else []
        )
        parts = [{"type": "image", "image": Image.open(io.BytesIO(image))} for image in images]
        asked = [*turns, {"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        inputs = processor.apply_chat_template(
            asked, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        most = draw.choice([1, 4, 8, 16, 24])
        made = model.generate(
            **inputs,
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=stops,
            return_dict_in_generate=True,
            output_logits=True,
        )
        likeliest = torch.cat(made.logits).topk(2).values
        if bool((likeliest[:, 0] - likeliest[:, 1] < NEAR).any()):
            continue  # with another order of sums it may be the other token
        ids = [token for token in made.sequences[0, inputs["input_ids"].shape[1] :].tolist() if token not in stops]
        parts = [*map(image_part, images), {"type": "text", "text": text}]
        n = draw.choice([1, 1, 1, 2])
        body = {"model": "tiny", "messages": [*turns, {"role": "user", "content": parts}], "max_tokens": most, "n": n}
        reply = reply_text(tokenizer, ids)
        if number % 7 == 0 and len(reply.strip()) > 4:
            stop = reply.strip()[3:5]
            reply, body["stop"] = reply[: reply.index(stop)], [stop]
        prompts.append(Prompt(body, dict.fromkeys(range(n), reply)))
    return prompts


async def sampled_prompts(port: int, greedy: list[Prompt]) -> list[Prompt]:
    """The same with tokens that are drawn; the texts are those of the request asked alone."""
    prompts, connection = [], Connection(port)
    for number, prompt in enumerate(greedy[::3]):
        body = prompt.body | {"temperature": 0.8, "top_p": 0.9, "seed": number}
        answer = await connection.ask(json.dumps(body).encode())
        assert answer is not None and answer.status == 200
        prompts.append(Prompt(body, answer.texts()))
    connection.close()
    return prompts


def broken_requests(good: Prompt) -> list[tuple[int, dict]]:
    """Requests that have to be refused: the status, and the arguments of `Connection.ask`."""

    def asked(**fields: object) -> bytes:
        return json.dumps({**good.body, **fields}).encode()

    def with_content(content: object) -> bytes:
        return asked(messages=[{"role": "user", "content": content}])

    def with_url(url: str) -> bytes:
        return with_content([{"type": "image_url", "image_url": {"url": url}}])

    whole = png(1)
    return [
        (400, {"body": b'{"model": "tiny", "messages": ['}),
        (400, {"body": b"\xff\xfe"}),
        (400, {"body": b"[" * 5000}),
        (400, {"body": b""}),
        (400, {"body": asked(max_tokens=0)}),
        (400, {"body": asked(max_tokens="5")}),
        (400, {"body": asked(n=0)}),
        (400, {"body": asked(temprature=1)}),
        (400, {"body": asked(tools=[{"type": "function"}])}),
        (400, {"body": asked(messages=[])}),
        (400, {"body": asked(messages=[{"role": "nobody", "content": "a"}])}),
        (400, {"body": asked(stream=True, temperature=3)}),
        (400, {"body": asked(model=None)}),
        (404, {"body": asked(model="another")}),
        (404, {"body": asked(), "path": "/v1/completions"}),
        (415, {"body": asked(), "kind": "text/plain"}),
        (400, {"body": with_url(data_uri(whole[: len(whole) // 2]))}),
        (400, {"body": with_url(data_uri(b"no image at all"))}),
        (400, {"body": with_url("data:image/png;base64,*")}),
        (400, {"body": with_url("/etc/passwd")}),
        (400, {"body": with_url("http://127.0.0.1:1/a.png")}),
        (400, {"body": with_content([image_part(whole)] * 40)}),
        (400, {"body": with_content("long " * 3000)}),
        (400, {"body": asked(max_tokens=MAX_LENGTH)}),
        (413, {"body": with_content("x" * MAX_BODY)}),
        (413, {"body": b"{", "length": 10**12}),
    ]


async def soak(port: int, count: int, prompts: list[Prompt], seed: int, mark: Callable[[], None]) -> Counts:
    """Send the requests, by several clients at once.

    Args:
        mark: called after each tenth of the requests, while none runs.
    """
    counts = Counts()
    broken = broken_requests(prompts[0])
    draw = random.Random(seed)
    kinds = draw.choices(["broken", "leaves", "slow", "plain"], [5, 6, 4, 85], k=count)

    async def one(connection: Connection, kind: str, number: int) -> None:
        prompt = prompts[number % len(prompts)]
        body = prompt.body | ({"stream": True} if number % 2 or kind in ("slow", "leaves") else {})
        sent = json.dumps(body).encode()
        if kind == "broken":
            status, request = broken[number % len(broken)]
            answer = await connection.ask(**request)
            if answer is None or answer.status != status or "message" not in json.loads(answer.body)["error"]:
                counts.wrong.append(f"{request['body'][:80]!r}: {answer}, not {status}")
            counts.refused[status] += 1
            return
        if kind == "leaves":
            await connection.ask(sent, leave_after=draw.choice([0, 1, 300, 600]))
            counts.left += 1
            return
        answer = await connection.ask(sent, pause=0.05 if kind == "slow" else 0.0)
        if not isinstance(answer, Answer) or answer.status != 200 or answer.texts() != prompt.texts:
            counts.wrong.append(f"{sent[-200:]!r}: {answer}, not {prompt.texts}")
        counts.answered += 1

    async def worker(numbers: Iterator[int]) -> None:
        connection = Connection(port)
        for number in numbers:
            try:
                await asyncio.wait_for(one(connection, kinds[number], number), 120)
            except Exception as error:  # whatever it is: the request is lost
                counts.wrong.append(f"request {number}, {kinds[number]}: {error!r}")
                connection.close()
            if number % 3 == 0:
                connection.close()
        connection.close()

    for tenth in range(10):
        numbers = iter(range(count * tenth // 10, count * (tenth + 1) // 10))
        await asyncio.gather(*(worker(numbers) for _ in range(WORKERS)))
        await until_idle(port)
        mark()
    return counts


def figures(port: int) -> dict[str, float]:
    """Of `/metrics`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if not line.startswith("#")}


async def until_idle(port: int) -> None:
    """Wait until nothing waits and nothing runs."""
    for _ in range(600):
        found = await asyncio.to_thread(figures, port)
        if found["finetune_waiting_requests"] == found["finetune_batch_rows"] == 0:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("requests are left that nobody waits for")


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    megabytes: float
    files: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        process = Path("/proc") / str(pid)
        resident = re.search(r"VmRSS:\s+(\d+) kB", (process / "status").read_text())
        assert resident is not None
        files, threads = (sum(1 for _ in (process / name).iterdir()) for name in ("fd", "task"))
        return cls(int(resident[1]) / 1000, files, threads)


@contextmanager
def served() -> Iterator[tuple[subprocess.Popen, int]]:
    """`finetune serve` on the tiny checkpoint, in a process of its own; and its port."""
    command = [sys.executable, "-u", "-m", "finetune", "serve", str(TINY), "--name", "tiny", "--port", "0"]
    command += ["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--max-body", "1MB"]
    command += ["--keep", "16MB"]  # is full long before the half of the requests
    # What is freed goes back to the system at once, so that resident memory is what is held: glibc keeps large pieces
    # otherwise, once some were freed, and more of them the more threads there are.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    environment |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    try:
        said = ""
        while not (found := re.search(r"serving +http://\S+:(\d+)/v1", said)):
            line = server.stdout.readline()
            assert line, f"the server has ended: {said}"
            said += line
        yield server, int(found[1])
    finally:
        server.kill()
        server.wait()


def run(count: int, seed: int = 0) -> None:
    """Raises:
    AssertionError: something was lost or grew.
    """
    greedy = greedy_prompts(random.Random(seed))
    with served() as (server, port):
        prompts = [*greedy, *asyncio.run(sampled_prompts(port, greedy))]
        marks: list[Held] = []
        counts = asyncio.run(soak(port, count, prompts, seed, lambda: marks.append(Held.by(server.pid))))
        found = figures(port)
        by_status = {name: int(value) for name, value in found.items() if name.startswith("finetune_requests_total")}
        refused = dict(sorted(counts.refused.items()))
        print(f"{counts.answered} answered, {sum(refused.values())} refused {refused}, {counts.left} left")
        print(f"wrong or lost: {len(counts.wrong)}; counted by the server: {by_status}")
        print(f"MB after each tenth: {', '.join(f'{one.megabytes:.0f}' for one in marks)}; at the end {marks[-1]}")
        assert not counts.wrong, counts.wrong[:3]
        assert counts.answered + counts.left + sum(refused.values()) == count
        before, after = marks[4], marks[-1]
        # Means, as what a moment holds goes up and down by 20 MB.
        early, late = (sum(one.megabytes for one in some) / 3 for some in (marks[2:5], marks[-3:]))
        assert late < early + GROWTH_MB
        assert after.files <= before.files + 2 and after.threads < 64
        # All that was well-formed and waited for was counted as such.
        assert by_status['finetune_requests_total{status="200"}'] >= counts.answered + len(greedy[::3])
        assert not any(status in name for name in by_status for status in ('"500"', '"502"', '"503"', '"429"'))
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 143


@pytest.mark.slow
def test_ten_thousand_requests_lose_nothing_and_hold_nothing():
    run(10_000)


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
