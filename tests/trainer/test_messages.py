"""What a command shows: lorgnette's own messages and its figures, and nothing that libraries say of themselves."""

import logging
import os
import re
import subprocess
import sys

import pytest
from tiny_training import write_backbones, write_pairs
from transformers.utils import logging as transformers_logging

from lorgnette.trainer.messages import _passing_bar, quiet_libraries


def test_a_missing_kernel_is_left_out_and_nothing_else_of_bitsandbytes(caplog, monkeypatch):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    quiet_libraries()
    quiet_libraries()
    assert len(logger.filters) == 1
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("inputs will be cast")
    assert caplog.messages == ["inputs will be cast"]


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_drawn_rarely_where_stderr_is_a_file(monkeypatch, terminal):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    quiet_libraries()
    assert ("TQDM_MININTERVAL" in os.environ) is not terminal


def test_bars_of_transformers_go_when_they_are_done():
    given = []
    _passing_bar(lambda *args, **settings: given.append((args, settings)), ([1],), {"desc": "Loading weights"})
    _passing_bar(lambda *args, **settings: given.append((args, settings)), (), {"disable": True})
    assert given == [
        (([1],), {"desc": "Loading weights", "leave": False, "disable": None}),
        ((), {"leave": False, "disable": True}),
    ]
    assert list(_passing_bar(transformers_logging.EmptyTqdm, ([1, 2],), {})) == [1, 2]


@pytest.mark.slow
def test_a_run_into_a_file_says_a_line_a_step(tmp_path):
    vision, text = write_backbones(tmp_path)
    command = ["train", "stage2", "--vision", vision, "--text", text, "--dataset", str(write_pairs(tmp_path / "pairs"))]
    command += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--logging_steps", "1"]
    kept = ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY")  # which the tests set, and users do not
    environment = {name: value for name, value in os.environ.items() if name not in kept}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "lorgnette.cli", *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stderr.splitlines()
    others = [line for line in lines if not re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) lorgnette\.", line)]
    figures = [r"step 1/2  epoch 0\.50  loss \S+ +lr 5\.00e-05  \S+ texts/s", r"step 2/2  epoch 1\.00  loss .* texts/s"]
    figures.append(r"step 2/2  epoch 1\.00  train_loss \S+ +\d+ s  \S+ rows/s")
    assert len(others) == len(figures)
    assert all(map(re.fullmatch, figures, others)), others
    assert sum("Models are saved in full" in line for line in lines) == 1
    assert lines[-2].endswith(f"{tmp_path / 'out'} holds the model and its processor, after step 2")
    assert lines[-1].endswith(f"next: lorgnette caption {tmp_path / 'out'} PICTURE")
    assert done.stdout == ""
