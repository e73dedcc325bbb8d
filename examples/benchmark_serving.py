"""Measure `finetune serve` on this machine: one client at a time, many at once, and arrivals at 70 % of the capacity.

    python examples/benchmark_serving.py [--model nano | mid | FOLDER] [--clients 16] [--rounds 3]

Starts the server by itself, in a process of its own, and asks it over HTTP, streamed. Each page of
`examples/quickstart/known` is asked about twice, its question and a transcription, and two questions have no image; no
question is asked twice in a phase, and no page is shown in two phases. One at a time, the questions of a page follow
one another; of many clients at once, each asks about pages of its own. Arrivals are evenly spaced, at 70 % of the
requests a second that the many clients of the same round had.

On a machine that does other work, times vary by more than what is measured: the phases alternate, and ratios are of
the phases of one round. CPU time depends less on what else runs: it is that of the thread that runs the model. Where
this thread has a core to itself, the ratio of tokens a second is at least that of its CPU times: the rest of the
server works beside it when many ask, and before and after it when one does.

`nano` is `examples/nano`. `mid` has random weights, which are written to a temporary folder: hidden size 1,024, 8
layers, 101 M parameters in its layers, 6 layers of width 512 in its vision transformer, the nano's vocabulary (752
tokens) and images (140 x 140 pixels, 100 positions). On two cores its decoding step is nearly all matrix products; its
replies are as long as they may be.
"""

import argparse
import asyncio
import base64
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from make_random_checkpoint import write_weights

EXAMPLES = Path(__file__).parent
NANO = EXAMPLES / "nano"
PAGES = EXAMPLES / "quickstart" / "known"
MID = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 5504}
MID |= {"kv_channels": 128}
MID_VISUAL = {"width": 512, "heads": 8, "layers": 6, "output_dim": 1024}
NAME = "measured"
LOAD = 0.7  # of the capacity


@dataclass(frozen=True)
class Question:
    """What a client asks."""

    text: str
    image: Path | None
    max_tokens: int

    @property
    def body(self) -> bytes:
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.image is not None:
            url = "data:image/png;base64," + base64.b64encode(self.image.read_bytes()).decode()
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        asked: dict[str, Any] = {
            "model": NAME,
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "stream": True,
        }
        asked |= {"max_tokens": self.max_tokens, "stream_options": {"include_usage": True}}
        return json.dumps(asked).encode()


@dataclass(frozen=True)
class Answered:
    """A question and its reply; times are seconds since it was sent, or should have been."""

    question: Question
    text: str
    tokens: int
    first: float
    last: float

    @property
    def per_token(self) -> float | None:
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class Phase:
    """What came of some questions that were asked in one way."""

    answered: list[Answered]
    lost: list[str]
    seconds: float
    cpu_seconds: float

    @property
    def cpu_per_token(self) -> float:
        """Of the server's busiest thread, which runs the model, in seconds."""
        return self.cpu_seconds / sum(one.tokens for one in self.answered)

    @property
    def tokens_per_second(self) -> float:
        return sum(one.tokens for one in self.answered) / self.seconds

    @property
    def requests_per_second(self) -> float:
        return len(self.answered) / self.seconds

    def first(self, percent: int) -> float:
        return percentile([one.first for one in self.answered], percent)

    def per_token(self, percent: int) -> float:
        return percentile([one.per_token for one in self.answered if one.per_token is not None], percent)


def percentile(values: Sequence[float], percent: int) -> float:
    """By the nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    port: int
    process: psutil.Process


class Lost(Exception):
    """A request without its whole reply."""


async def ask(port: int, question: Question, since: float) -> Answered:
    """Ask over HTTP and read the streamed reply.

    A client of some lines, since one that does more would take time from the server that it measures.

    Raises:
        Lost: the reply is not whole.
    """
    body = question.body
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        status = await reader.readline()
        headers = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status or b"chunked" not in headers:
            raise Lost(f"{status!r} {await reader.read()!r}")
        first = last = None
        text, usage, finish, done, held = "", 0, None, False, b""
        while size := int(await reader.readline(), 16):
            held += (await reader.readexactly(size + 2))[:-2]
            *events, held = held.split(b"\n\n")
            now = time.perf_counter() - since
            for event in events:
                if event == b"data: [DONE]":
                    done = True
                    continue
                read = json.loads(event.removeprefix(b"data: "))
                usage = (read.get("usage") or {}).get("completion_tokens", usage)
                for choice in read["choices"]:
                    text += choice["delta"].get("content") or ""
                    finish = choice["finish_reason"] or finish
                    if choice["delta"].get("content") or choice["finish_reason"]:
                        first, last = now if first is None else first, now
        if not done or finish is None or first is None or last is None:
            raise Lost(f"the stream ended after {text!r}, finish {finish}")
        return Answered(question, text, usage, first, last)
    except (OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
        raise Lost(repr(error)) from error
    finally:
        writer.close()


class Clock:
    """Seconds since it was made: of the wall clock, and of CPU time of a process's busiest thread."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._start, self._cpu_start = time.perf_counter(), self._cpu()

    def phase(self, answered: list[Answered], lost: list[str]) -> Phase:
        cpu = max(seconds - self._cpu_start.get(thread, 0.0) for thread, seconds in self._cpu().items())
        return Phase(answered, lost, time.perf_counter() - self._start, cpu)

    def _cpu(self) -> dict[int, float]:
        return {one.id: one.user_time + one.system_time for one in self._process.threads()}


async def in_turns(server: Server, of_clients: Sequence[Sequence[Question]]) -> Phase:
    """Each client asks its questions one after another; the clients at once."""
    answered: list[Answered] = []
    lost: list[str] = []

    async def client(questions: Sequence[Question]) -> None:
        for question in questions:
            try:
                answered.append(await ask(server.port, question, time.perf_counter()))
            except Lost as error:
                lost.append(str(error))

    clock = Clock(server.process)
    await asyncio.gather(*map(client, of_clients))
    return clock.phase(answered, lost)


async def arriving(server: Server, questions: Sequence[Question], per_second: float) -> Phase:
    """Questions are asked at even distances, whether or not those before them are answered."""
    start, clock = time.perf_counter(), Clock(server.process)

    async def arrive(number: int, question: Question) -> Answered:
        due = start + number / per_second
        await asyncio.sleep(due - time.perf_counter())
        return await ask(server.port, question, due)

    ended = await asyncio.gather(*(arrive(*one) for one in enumerate(questions)), return_exceptions=True)
    answered = [one for one in ended if isinstance(one, Answered)]
    lost = [str(one) for one in ended if not isinstance(one, Answered)]
    return clock.phase(answered, lost)


class Questions:
    """Questions about pages, each page in one phase alone as long as there are enough.

    Args:
        kinds: "image", "text" or "both".
        max_tokens: of each reply.
    """

    def __init__(self, kinds: str, max_tokens: int) -> None:
        rows = [row for split in ("test", "train") for row in (PAGES / f"{split}.jsonl").read_text().splitlines()]
        self._rows = [json.loads(row) for row in rows]
        self._kinds, self._max_tokens, self._next = kinds, max_tokens, 0

    def take(self, clients: int, pages: int) -> list[list[Question]]:
        """For each client the questions about this many pages."""
        return [[question for _ in range(pages) for question in self._of_a_page()] for _ in range(clients)]

    def _of_a_page(self) -> list[Question]:
        row, number = self._rows[self._next % len(self._rows)], self._next
        self._next += 1
        image = PAGES / row["images"][0]
        asked = row["messages"][0]["content"][-1]["text"]
        with_image = [(asked, image), ("Write down all the text.", image)]
        without = [(f"{number} {asked}", None), (f"Which is more: {number} or {number + 7}?", None)]
        chosen = {"image": with_image, "text": without, "both": [*with_image, *without]}[self._kinds]
        return [Question(text, image, self._max_tokens) for text, image in chosen]


@dataclass(frozen=True)
class Round:
    """The three phases, one after another."""

    alone: Phase
    many: Phase
    spaced: Phase

    @property
    def phases(self) -> list[Phase]:
        return [self.alone, self.many, self.spaced]

    @property
    def speedup(self) -> float:
        return self.many.tokens_per_second / self.alone.tokens_per_second

    @property
    def cpu_speedup(self) -> float:
        return self.alone.cpu_per_token / self.many.cpu_per_token

    @property
    def waiting(self) -> float:
        """Median time to the first token at 70 %, by what it may be: twice the idle one and a step."""
        return self.spaced.first(50) / (2 * self.alone.first(50) + self.spaced.per_token(50))


async def measure(server: Server, questions: Questions, clients: int, pages: int, rounds: int) -> list[Round]:
    """Alternate the phases."""
    await in_turns(server, questions.take(clients, 1))  # to warm up
    measured = []
    for number in range(rounds):
        alone = await in_turns(server, questions.take(1, 4 * pages))
        many = await in_turns(server, questions.take(clients, pages))
        [spaced] = questions.take(1, clients * pages)
        measured.append(Round(alone, many, await arriving(server, spaced, LOAD * many.requests_per_second)))
        one = measured[-1]
        print(f"round {number + 1}: {one.speedup:.2f} times the tokens/s, waiting {one.waiting:.2f}", file=sys.stderr)
    return measured


async def same_alone(server: Server, rounds: Sequence[Round], count: int) -> str:
    """How many replies that were made together are the same if asked again, alone."""
    answered = [one for measured in rounds for phase in (measured.many, measured.spaced) for one in phase.answered]
    some = answered[:: max(1, len(answered) // count)]
    again = [await ask(server.port, one.question, time.perf_counter()) for one in some]
    return f"{sum(one.text == other.text for one, other in zip(some, again, strict=True))} of {len(some)}"


def table(rounds: Sequence[Round], clients: int) -> str:
    """Markdown: each way of asking, the median of the rounds; then the ratios, as smallest / median / largest."""
    lines = [
        "| | requests | lost | tokens/s | first token p50 | p95 | time per token p50 | p95 | CPU time per token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ways = ["one at a time", f"{clients} at once", f"spaced, {LOAD:.0%} of the capacity"]
    for number, way in enumerate(ways):
        phases = [one.phases[number] for one in rounds]

        def median(values: Sequence[float]) -> float:
            return statistics.median(values)

        times = [
            median([one.first(50) for one in phases]),
            median([one.first(95) for one in phases]),
            median([one.per_token(50) for one in phases]),
            median([one.per_token(95) for one in phases]),
            median([one.cpu_per_token for one in phases]),
        ]
        asked = sum(len(one.answered) + len(one.lost) for one in phases)
        lost = sum(len(one.lost) for one in phases)
        rate = median([one.tokens_per_second for one in phases])
        cells = [way, str(asked), str(lost), f"{rate:,.1f}", *(f"{1000 * one:,.3g} ms" for one in times)]
        lines.append(f"| {' | '.join(cells)} |")

    def spread(values: Sequence[float]) -> str:
        return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"

    return "\n".join(
        [
            *lines,
            "",
            f"Of {len(rounds)} rounds, smallest / median / largest:",
            f"- tokens/s of {clients} at once, by one at a time: {spread([one.speedup for one in rounds])}",
            f"- the same by CPU time of the thread that runs the model: {spread([one.cpu_speedup for one in rounds])}",
            "- median time to the first token at the spaced load, by twice the idle one and a step: "
            + spread([one.waiting for one in rounds]),
        ]
    )


def write_mid(folder: Path) -> None:
    """A checkpoint with random weights, the nano's vocabulary and its image size."""
    from qwenvl import QwenVLConfig

    config = QwenVLConfig.from_pretrained(NANO)
    assert config.visual is not None
    for name, value in MID.items():
        setattr(config, name, value)
    config.visual = {**config.visual, **MID_VISUAL}
    config.random_weights = True
    folder.mkdir()
    config.save_pretrained(folder)
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(NANO / name, folder / name)
    write_weights(config, folder, seed=0)


@contextmanager
def served(folder: Path, options: Sequence[str]) -> Iterator[Server]:
    """Run `finetune serve`, and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "finetune", "serve", str(folder), "--name", NAME, "--port", str(port)]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    try:
        while True:
            if server.poll() is not None:
                raise SystemExit(f"the server ended with status {server.returncode}: {' '.join(command)}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
            except OSError:
                time.sleep(0.2)
        yield Server(port, psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="nano, mid, or a folder")
    parser.add_argument("--kinds", choices=["both", "image", "text"], default="both", help="of questions")
    parser.add_argument("--clients", type=int, default=16, help="at once")
    parser.add_argument("--pages", type=int, default=2, help="that each client asks about in a phase")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a reply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--option", action="append", default=[], help="of `finetune serve`, such as --option=--dtype=float32"
    )
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = {"nano": NANO, "mid": Path(temporary) / "mid"}.get(arguments.model, Path(arguments.model))
        if arguments.model == "mid":
            write_mid(folder)
        with served(folder, arguments.option) as server:
            questions = Questions(arguments.kinds, arguments.max_tokens)
            rounds = asyncio.run(measure(server, questions, arguments.clients, arguments.pages, arguments.rounds))
            print(
                f"\n{arguments.model}, questions: {arguments.kinds}, replies of up to {arguments.max_tokens} tokens\n"
            )
            print(table(rounds, arguments.clients))
            for error in [error for one in rounds for phase in one.phases for error in phase.lost][:5]:
                print(f"lost: {error}")
            print(f"- replies that are the same asked alone: {asyncio.run(same_alone(server, rounds, 40))}")


if __name__ == "__main__":
    main()
