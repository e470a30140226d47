"""Which checkpoint a run goes on from, and what it says of those that it passes over."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainingArguments

from lorgnette.trainer.checkpoints import checkpoint_to_resume, fault_of


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a folder of the files that Trainer saves."""

    def make(step):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("config.json", "trainer_state.json"):
            (folder / name).write_text(json.dumps({"global_step": step}))
        save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"state": torch.zeros(3)}, folder / name)
        return folder

    return make


@pytest.fixture
def args(tmp_path):
    return lambda resume=None: TrainingArguments(str(tmp_path), use_cpu=True, resume_from_checkpoint=resume)


def test_resuming_takes_the_newest_whole_checkpoint_and_names_what_it_passes_over(checkpoint, args, caplog):
    assert checkpoint_to_resume(args()) is None
    five, ten, hundred = (checkpoint(step) for step in (5, 10, 100))
    assert checkpoint_to_resume(args("true")) == str(hundred)
    assert caplog.messages == []
    (hundred / "trainer_state.json").unlink()
    assert checkpoint_to_resume(args("true")) == str(ten)
    assert caplog.messages == [
        f"{hundred} is incomplete: no trainer_state.json; skipping it, resuming from checkpoint-10."
    ]
    assert checkpoint_to_resume(args(str(five))) == str(five)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-100 is not a complete checkpoint: no trainer_state"):
        checkpoint_to_resume(args(str(hundred)))
    for folder in (five, ten):
        (folder / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"-100 is incomplete.*-10 is incomplete.*-5 is incomplete: no opt"):
        checkpoint_to_resume(args("true"))


def test_a_run_that_was_cut_off_before_its_first_checkpoint_was_whole_begins_anew(checkpoint, args, tmp_path, caplog):
    assert checkpoint_to_resume(args("true")) is None
    (checkpoint(5) / "trainer_state.json").unlink()
    assert checkpoint_to_resume(args("true")) is None
    nothing = f"{tmp_path} holds no complete checkpoint to resume from"
    assert caplog.messages == [
        f"{nothing}. Training starts from the beginning.",
        f"{nothing}; {tmp_path}/checkpoint-5 is incomplete: no trainer_state.json. Training starts from the beginning.",
    ]
    (tmp_path / "config.json").touch()  # of a model that is done: not to be trained over
    with pytest.raises(FileNotFoundError, match=r"holds no complete checkpoint; .*checkpoint-5 is incomplete"):
        checkpoint_to_resume(args("true"))


def test_nothing_is_overwritten(checkpoint, args):
    shutil.rmtree(checkpoint(1))
    assert checkpoint_to_resume(args()) is None
    checkpoint(2)
    with pytest.raises(FileExistsError, match="already holds a trained model or its checkpoints"):
        checkpoint_to_resume(args())


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"]
)
def test_a_file_that_is_gone_or_cut_is_named(checkpoint, name):
    folder = checkpoint(1)
    assert fault_of(folder) is None
    content = (folder / name).read_bytes()
    for length in (0, len(content) // 2, len(content) - 1):
        (folder / name).write_bytes(content[:length])
        assert fault_of(folder).startswith(f"{name} cannot be read (")
    (folder / name).unlink()
    assert fault_of(folder).startswith("no weights" if name == "model.safetensors" else f"no {name}")


def test_shards_are_all_there(checkpoint):
    folder = checkpoint(1)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fault_of(folder) == "no model-00002-of-00002.safetensors, which model.safetensors.index.json lists"
    save_file({"bias": torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    assert fault_of(folder) is None


@pytest.mark.parametrize("processes", [2, 3, 11])
def test_random_numbers_of_all_processes_are_there(checkpoint, processes):
    """Without its own a process goes on with others; the first process writes the state before another is through."""
    folder = checkpoint(1)
    content = (folder / "rng_state.pth").read_bytes()
    (folder / "rng_state.pth").unlink()
    for rank in range(processes):
        (folder / f"rng_state_{rank}.pth").write_bytes(content)
    assert fault_of(folder) is None
    (folder / "rng_state_1.pth").unlink()
    assert fault_of(folder) == "no rng_state_1.pth"
