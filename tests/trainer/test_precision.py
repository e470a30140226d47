"""bf16 where the machine has units for it, unless somebody says otherwise."""

import pytest
import torch

from lorgnette.trainer import precision


@pytest.fixture
def machine(monkeypatch):
    """A machine with a CPU or a CUDA device, with or without bf16; nobody has said anything."""

    def has(*, cuda: bool = False, cuda_bf16: bool = False, amx: bool = False) -> torch.device:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda_bf16)
        device = torch.device("cuda" if cuda else "cpu")
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        return device

    return has


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, "no"),
        ({"amx": True}, "bf16"),
        ({"cuda": True, "amx": True}, "no"),  # an older GPU: the CPU beside it does not matter
        ({"cuda": True, "cuda_bf16": True}, "bf16"),
    ],
)
def test_the_machine_decides(machine, parts, expected):
    device = machine(**parts)
    assert precision.default_mixed_precision() == precision.default_mixed_precision(device) == expected


def test_the_cpu_beside_a_gpu(machine):
    machine(cuda=True, cuda_bf16=True)
    assert precision.default_mixed_precision(torch.device("cpu")) == "no"


def test_whoever_launches_decides_first(machine, monkeypatch):
    machine(amx=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert precision.default_mixed_precision() == "no"


@pytest.mark.parametrize(("name", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_by_name(name, dtype):
    with precision.autocast(name, torch.device("cpu")):
        assert torch.nn.Linear(2, 2)(torch.ones(2)).dtype == dtype


def test_what_is_no_mixed_precision_here():
    with pytest.raises(ValueError, match="mixed_precision is 'fp8'; this command takes no, bf16 and fp16"):
        precision.autocast("fp8", torch.device("cpu"))
