"""What a command's process takes itself for."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from lorgnette.trainer import process


@pytest.mark.parametrize(
    ("said", "accelerator", "cpu"), [(None, False, True), (None, True, False), ("true", True, True)]
)
def test_the_cpu_is_asked_for_where_there_is_nothing_else_or_somebody_says_so(monkeypatch, said, accelerator, cpu):
    asked = []

    class State:
        is_main_process = True

        def __init__(self, **settings):
            asked.append(settings)

    monkeypatch.setattr(process, "PartialState", State)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if said:
        monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    process.start_process()
    assert asked == [{"cpu": cpu}]


_LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "warns"),
    [
        (_LAUNCHED, True),
        (_LAUNCHED | {"WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, False),  # of a cluster's scheduler, say
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),  # one was asked for
        (_LAUNCHED | {"WORLD_SIZE": "1"}, False),
        (_LAUNCHED | {"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_fewer_processes_than_were_asked_for_are_told_of(monkeypatch, caplog, environment, warns):
    for name in (*_LAUNCHED, *process._WORLD_SIZES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging.getLogger("lorgnette"), "propagate", True)
    process.warn_of_missing_processes()
    assert ("torchrun --nproc_per_node 2" in caplog.text) == warns


def test_accelerate_launch_with_cpu_starts_one_process_and_we_say_so():
    program = "from lorgnette.trainer.process import start_process; print(start_process().num_processes)"
    launch = "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += " --dynamo_backend no --no_python"
    environment = {name: value for name, value in os.environ.items() if name not in (*_LAUNCHED, *process._WORLD_SIZES)}
    run = subprocess.run(
        [sys.executable, "-m", *launch.split(), sys.executable, "-c", program],
        capture_output=True, text=True, timeout=300, check=True, env=environment,
    )  # fmt: skip
    assert run.stdout.split() == ["1"] or run.stdout.split() == ["2", "2"]  # another accelerate may start two
    assert ("torchrun --nproc_per_node 2" in run.stderr) == (run.stdout.split() == ["1"])
