"""Starts a command, waits for a moment, and kills it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


PATIENCE = 300  # seconds without the path that is waited for, or an end
_POLL = 0.0005  # seconds: a checkpoint of tiny parts takes some tens of milliseconds


@dataclass(frozen=True)
class Moment:
    """When a command is killed.

    Args:
        name: what it does then.
        after: relative to its output folder, the path that it has to have made or changed; "" for none.
        seconds: how long it may go on then.
    """

    name: str
    after: str
    seconds: float


def run_to_its_end(arguments: list[str], log: Path, environment: dict[str, str], watched: Path) -> dict[str, float]:
    """Run `python ARGUMENTS`, uninterrupted.

    Returns:
        each path that was seen in `watched` meanwhile, relative to it, and after how many seconds it was first seen.

    Raises:
        RuntimeError: it failed, or took too long; with the end of its log.
    """
    seen: dict[str, float] = {}
    with _started(arguments, log, environment) as process:
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < PATIENCE:
            now = time.monotonic() - begun
            for folder, folders, files in os.walk(watched):
                for name in (*folders, *files):
                    seen.setdefault(os.path.relpath(os.path.join(folder, name), watched), now)
            time.sleep(_POLL)
    _check(process, log)
    return seen


def run_and_kill(arguments: list[str], log: Path, environment: dict[str, str], watched: Path, moment: Moment) -> bool:
    """Run `python ARGUMENTS` and SIGKILL it at a moment of its work in the folder `watched`.

    Returns:
        whether it was killed; it may have been through before.

    Raises:
        RuntimeError: it failed by itself, or the moment never came; with the end of its log.
    """
    path = os.path.join(watched, moment.after)
    begun, patient_until = time.time_ns(), time.monotonic() + PATIENCE
    with _started(arguments, log, environment) as process:
        while process.poll() is None and moment.after and not _changed_since(path, begun):
            if time.monotonic() > patient_until:
                raise RuntimeError(f"{moment.name}: {path} never came\n{_tail(log)}")
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
