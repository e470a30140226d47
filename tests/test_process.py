"""What a command's process takes itself for."""

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
