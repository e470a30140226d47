"""Start a command, wait for a moment, and kill it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


TIMEOUT_S = 300  # for the awaited path, or the end of the command
_POLL = 0.0005  # seconds; writing a tiny checkpoint takes some tens of milliseconds


@dataclass(frozen=True)
class Moment:
    """The moment of a kill.

    Args:
        name: the command's activity at that moment.
        after: wait until the command makes or changes this path, relative to its output folder; "" for none.
        seconds: additional time before the kill.
    """

    name: str
    after: str
    seconds: float


def run_to_its_end(arguments: list[str], log: Path, environment: dict[str, str], watched: Path) -> dict[str, float]:
    """Run `python ARGUMENTS`, uninterrupted.

    Returns:
        each path that appeared in `watched`, relative to it, and the seconds until it was first seen.

    Raises:
        RuntimeError: it failed or took too long; with the end of its log.
    """
    seen: dict[str, float] = {}
    with _started(arguments, log, environment) as process:
        started_at = time.monotonic()
        while process.poll() is None and time.monotonic() - started_at < TIMEOUT_S:
            now = time.monotonic() - started_at
            for folder, folders, files in os.walk(watched):
                for name in (*folders, *files):
                    seen.setdefault(os.path.relpath(os.path.join(folder, name), watched), now)
            time.sleep(_POLL)
    _check(process, log)
    return seen


def run_and_kill(arguments: list[str], log: Path, environment: dict[str, str], watched: Path, moment: Moment) -> bool:
    """Run `python ARGUMENTS` and SIGKILL it at a moment of its work in `watched`.

    Returns:
        whether it was killed; it may have finished before.

    Raises:
        RuntimeError: it failed by itself, or the moment never occurred; with the end of its log.
    """
    path = os.path.join(watched, moment.after)
    started_at, timeout_at = time.time_ns(), time.monotonic() + TIMEOUT_S
    with _started(arguments, log, environment) as process:
        while process.poll() is None and moment.after and not _changed_since(path, started_at):
            if time.monotonic() > timeout_at:
                raise RuntimeError(f"{moment.name}: {path} never appeared\n{_tail(log)}")
            time.sleep(_POLL)
        time.sleep(moment.seconds)
        process.kill()
    if process.returncode != -signal.SIGKILL:
        _check(process, log)
    return process.returncode == -signal.SIGKILL


@contextmanager
def _started(arguments: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process; at the end it is killed with its data loader workers and an export's verification process."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _changed_since(path: str, time_ns: int) -> bool:
    try:
        return os.stat(path).st_mtime_ns >= time_ns
    except FileNotFoundError:
        return False


def _check(process: subprocess.Popen, log: Path) -> None:
    if process.returncode != 0:
        raise RuntimeError(f"{process.args} ended with status {process.returncode}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]
