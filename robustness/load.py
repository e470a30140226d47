"""Test a worker under load: right answers, no lost requests, bounded memory; and measure its speed.

    python -m robustness.load

Starts `lorgnette serve` on tiny random backbones with two bridges, first with `--max-batch 1`, then batched, and sends
requests from 64 callers for a minute each: both bridges, LoRA on and off, prompts of several lengths, pictures in the
request and from a host; 10 % invalid requests, 5 % that disconnect. Each answer is compared with the one to the same
request without load. Prints a table and writes it to `results/load.md`, and all figures to `load.json` beside it. Exits
with status 1 if an answer is wrong, a caller gets none, or resident memory grows by more than [`BOUND`].
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import numpy as np
import psutil
from tiny_serving import data_url, picture_host, save_bridges

from examples.demo.report import machine
from examples.quality.steps import say


BOUND = 16 * 2**20  # bytes by which the peak of the second half of a run may exceed that of the first
BAD, HANG_UP = 0.10, 0.05  # fractions of the requests
TIMEOUT_S = 120.0  # without batching requests are slow, and their times are measured
PROMPTS = ("What is this?", "Describe the picture, and tell what is in front. " * 2)
# an invalid request's fields, and its status
FAULTY = [
    ({"adapter": "three"}, 404),
    ({"prompt": ""}, 422),
    ({"prompt": "a" * 2**20}, 422),
    ({"use_lora": "no"}, 422),
    ({"image_url": "http://localhost/a.png"}, 400),
    ({"image_url": "http://[::ffff:169.254.169.254]/"}, 400),
    ({"image_url": "HOST/gone"}, 502),
    ({"image_url": "HOST/page"}, 422),
    ({"image_url": "HOST/huge"}, 422),
]


@dataclass
class Outcome:
    """The callers' results for one worker.

    Args:
        seconds: from the first request to the last answer.
        took: seconds for each right answer.
        counts: of `right`, `wrong`, `lost` (no answer, or another error), `told` (an invalid request
            got its status), `mistold` (it did not), `hung up`, `busy` (a 503, retried).
        resident: bytes, every half second.
        lost: their messages.
    """

    seconds: float
    took: list[float] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    resident: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def grown(self) -> int:
        half = len(self.resident) // 2
        return max(self.resident[half:]) - max(self.resident[:half])

    @property
    def holds(self) -> bool:
        nothing_wrong = not (self.counts["wrong"] or self.counts["lost"] or self.counts["mistold"])
        return nothing_wrong and self.counts["right"] > 0 and self.grown <= BOUND

    def figures(self) -> dict[str, Any]:
        p50, p99 = np.quantile(self.took, (0.5, 0.99)) if self.took else (float("nan"),) * 2
        return {
            **{name: self.counts[name] for name in ("right", "wrong", "lost", "told", "mistold", "hung up", "busy")},
            "requests_per_second": round(self.counts["right"] / self.seconds, 2),
            "p50_seconds": round(float(p50), 3),
            "p99_seconds": round(float(p99), 3),
            "resident_mib": round(max(self.resident) / 2**20, 1),
            "grown_mib": round(self.grown / 2**20, 1),
        }


@contextmanager
def worker(folder: Path, max_batch: int) -> Iterator[tuple[str, psutil.Process]]:
    """Run `lorgnette serve` in a process; yields its URL and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lorgnette.cli", "serve", str(folder / "one"), "--name", "one"]
    command += ["--bridge", f"two={folder / 'two'}", "--internal-host", "127.0.0.1", "--port", str(port)]
    command += ["--max-batch", str(max_batch), "--max-new-tokens", "16", "--timeout", str(TIMEOUT_S), "--device", "cpu"]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = folder / f"worker-{max_batch}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | settings)
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
            while True:
                with suppress(httpx2.TransportError):
                    httpx2.get(f"{url}/healthz", timeout=5).raise_for_status()
                    break
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the worker did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def questions(host: str) -> list[dict[str, Any]]:
    """All requests; each has one right answer."""
    return [
        {
            "image_url": f"{host}/picture/{seed}" if seed % 2 else data_url(seed),
            "prompt": prompt,
            "adapter": adapter,
            "use_lora": use_lora,
        }
        for seed in range(4)
        for prompt in PROMPTS
        for adapter in ("one", "two")
        for use_lora in (True, False)
    ]


async def ask_all(url: str, host: str, process: psutil.Process, callers: int, seconds: float) -> Outcome:
    """Send each request alone, then from `callers` concurrently for so many seconds."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S + 10, limits=limits) as client:
        asked = questions(host)
        alone = [(await client.post("/v1/vision", json=question)).raise_for_status().json() for question in asked]
        outcome, start = Outcome(seconds), time.monotonic()
        end = start + seconds

        async def watch() -> None:
            while time.monotonic() < end:
                outcome.resident.append(process.memory_info().rss)
                await asyncio.sleep(0.5)

        async def call(random: Random) -> None:
            while time.monotonic() < end:
                draw, which = random.random(), random.randrange(len(asked))
                try:
                    if draw < BAD:
                        await ask_badly(client, asked[which], host, random, outcome)
                    elif draw < BAD + HANG_UP:
                        with suppress(TimeoutError):
                            async with asyncio.timeout(random.uniform(0.001, 0.5)):
                                await client.post("/v1/vision", json=asked[which])
                        outcome.counts["hung up"] += 1
                    else:
                        await ask_well(client, asked[which], alone[which], outcome)
                except httpx2.HTTPError as error:
                    outcome.counts["lost"] += 1
                    outcome.lost.append(f"{type(error).__name__}: {error}")

        await asyncio.gather(watch(), *(call(Random(seed)) for seed in range(callers)))
        outcome.seconds = time.monotonic() - start  # includes the last answers
    return outcome


async def ask_well(
    client: httpx2.AsyncClient, question: dict[str, Any], alone: dict[str, Any], outcome: Outcome
) -> None:
    while True:
        start = time.monotonic()
        response = await client.post("/v1/vision", json=question)
        if response.status_code != 503:
            break
        outcome.counts["busy"] += 1
        await asyncio.sleep(int(response.headers["retry-after"]))
    if response.status_code != 200:
        outcome.counts["lost"] += 1
        outcome.lost.append(f"{response.status_code}: {response.text[:300]}")
    elif response.json() == alone:
        outcome.counts["right"] += 1
        outcome.took.append(time.monotonic() - start)
    else:
        outcome.counts["wrong"] += 1


async def ask_badly(
    client: httpx2.AsyncClient, question: dict[str, Any], host: str, random: Random, outcome: Outcome
) -> None:
    changed, status = random.choice(FAULTY)
    changed = {name: value.replace("HOST", host) for name, value in changed.items()}
    response = await client.post("/v1/vision", json=question | changed)
    if response.status_code == 503:
        outcome.counts["busy"] += 1
    else:
        is_right = response.status_code == status and response.json()["error"]["message"]
        outcome.counts["told" if is_right else "mistold"] += 1


def table(report: dict[str, Any]) -> str:
    """The Markdown table: a line for each worker."""
    lines = [f"{report['machine']}; {report['callers']} callers, {report['seconds']:g} s each", ""]
    lines += ["| questions at a time | right | wrong | lost | requests/s | p50 | p99 | memory grew by |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for batch, figures in report["workers"].items():
        counts = " | ".join(str(figures[name]) for name in ("right", "wrong", "lost"))
        times = (
            f"{figures['requests_per_second']:.1f} | {figures['p50_seconds']:.2f} s | {figures['p99_seconds']:.2f} s"
        )
        lines.append(f"| {batch} | {counts} | {times} | {figures['grown_mib']:.1f} MiB |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Test both workers; returns 1 if one fails."""
    parser = ArgumentParser(prog="python -m robustness.load", description=__doc__.partition("\n")[0])
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of the two workers")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"machine": machine(), "callers": args.callers, "seconds": args.seconds}
    report["versions"] = {name: version(name) for name in ("torch", "transformers", "fastapi", "uvicorn")}
    report["workers"], holds = {}, True
    with tempfile.TemporaryDirectory() as scratch, picture_host() as host:
        save_bridges(Path(scratch))
        for max_batch in (1, 8):
            with worker(Path(scratch), max_batch) as (url, process):
                outcome = asyncio.run(ask_all(url, host, process, args.callers, args.seconds))
            holds &= outcome.holds
            report["workers"][str(max_batch)] = outcome.figures() | {"first lost": outcome.lost[:3]}
            say(f"{max_batch} at a time: {json.dumps(report['workers'][str(max_batch)])}")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "load.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (args.output / "load.md").write_text(table(report), encoding="utf-8")
    say(table(report))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
