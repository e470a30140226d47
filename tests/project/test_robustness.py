"""What a run does when what it stands on fails: the disk, a worker, a row; and how it goes on afterwards."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import tiny
import tiny_models
from processes import run_processes
from safetensors import SafetensorError
from tiny_training import joined, pairs, trainer, write_backbones, write_pairs
from transformers import Trainer, TrainerCallback, set_seed

from lorgnette.trainer.__main__ import main
from lorgnette.trainer.checkpoints import checkpoint_to_resume, fault_of, train_from
from robustness.cases import FolderState, Training
from robustness.comparing import differences


QFORMER = '{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}'
SAVING = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Backbones, pictures, and in `whole` what a run makes of them that nothing interrupts."""
    folder = tmp_path_factory.mktemp("parts")
    write_backbones(folder)
    write_pairs(folder / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        main(stage2(folder, folder / "whole"))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def stage2(folder: Path, output: Path, *options: str) -> list[str]:
    """Six steps, an epoch and a half, and a checkpoint after every other one."""
    command = (
        f"stage2 --vision {folder}/vit --text {folder}/llama --num_query_tokens 4 --dataset {folder}/pictures "
        f"--output_dir {output} --max_steps 6 --save_steps 2 --per_device_train_batch_size 3 --learning_rate 1e-2 "
        "--lr_scheduler_type constant --logging_steps 1 --report_to none --use_cpu"
    )
    return [*command.split(), "--qformer_config", QFORMER, "--lora", '{"r": 2, "lora_dropout": 0.1}', *options]


def run(folder: Path, output: Path, seed: int = 0, **settings) -> Trainer:
    set_seed(seed)
    backbones = (str(folder / "vit"), str(folder / "llama"))
    return trainer(*joined(backbones), output, **(SAVING | {"resume_from_checkpoint": "true"} | settings))


def go_on(run: Trainer) -> Trainer:
    train_from(run, checkpoint_to_resume(run.args))
    run.save_model()
    run.save_state()
    return run


class Interrupt(TrainerCallback):
    """Does something after a step and before what is saved of it."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do()


def cut_off():
    raise KeyboardInterrupt


def test_the_comparison_sees_every_bit_and_no_clock(folder, tmp_path):
    """What these tests and `make robustness` rest on."""
    whole, copy = folder / "whole" / "checkpoint-4", tmp_path / "copy"
    shutil.copytree(whole, copy)
    state = json.loads((copy / "trainer_state.json").read_text())
    state["log_history"][0]["eval_runtime"] = 1.5
    (copy / "trainer_state.json").write_text(json.dumps(state))
    assert differences(copy, whole) == []
    state["log_history"][0]["loss"] += 1e-7
    (copy / "trainer_state.json").write_text(json.dumps(state))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    (copy / "rng_state.pth").unlink()
    (copy / "more.txt").touch()
    found = ["model.safetensors", "has more.txt", "lacks rng_state.pth", "trainer_state.json: log_history"]
    assert differences(copy, whole) == found


def test_where_a_kill_fell_is_read_off_what_that_process_has_touched(folder, tmp_path):
    """Not off what an earlier one has left half deleted or half written."""
    case, reference, output = Training(tmp_path), folder / "whole", tmp_path / "out"
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(reference / name, output / name)
    count = sum(path.is_file() for path in (reference / "checkpoint-2").rglob("*"))

    def begin():
        now = time.time_ns()
        time.sleep(0.05)  # more than a tick of the clock that stamps files
        return now

    started_at = begin()
    assert case.state_after_kill(output, reference, started_at) == FolderState(
        "in training, after checkpoint-4", "checkpoint-4", []
    )
    (output / "checkpoint-2" / "optimizer.pt").unlink()
    fell = f"in the deletion of checkpoint-2, {count - 1} of {count} files left"
    assert case.state_after_kill(output, reference, started_at) == FolderState(fell, "checkpoint-4", [])
    assert case.state_after_kill(output, reference, begin()).fell == "in training, after checkpoint-4"
    started_at = begin()
    (output / "checkpoint-4" / "trainer_state.json").unlink()
    fell = f"in the writing of checkpoint-4, {count - 1} of {count} files"
    assert case.state_after_kill(output, reference, started_at) == FolderState(fell, "the start", [])
    shutil.copy2(reference / "checkpoint-2" / "optimizer.pt", output / "checkpoint-2")
    weights = output / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    left = case.state_after_kill(output, reference, begin())
    assert (left.whole, left.unlike) == ("checkpoint-2", ["checkpoint-2: model.safetensors"])


# ------------------------------------------------------------------------------------------------ going on


def test_from_the_last_checkpoint_no_step_more_is_taken(folder, tmp_path):
    """A run that was killed between its last checkpoint and the save at its end, which is amidst an epoch."""
    output = tmp_path / "out"
    shutil.copytree(folder / "whole" / "checkpoint-6", output / "checkpoint-6")
    main(stage2(folder, output, "--resume_from_checkpoint", "true"))
    assert differences(output, folder / "whole") == []
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-6"]


def test_stage_1_goes_on_as_it_would_have_gone(folder, tmp_path):
    """Its negatives are drawn at random, as dropout is."""
    words = tiny.bert_tokenizer()
    for part in (tiny_models.bert(vocab_size=len(words)), words):
        part.save_pretrained(tmp_path / "bert")
    command = (
        f"stage1 --vision {folder}/vit --qformer {tmp_path}/bert --num_query_tokens 4 --dataset {folder}/pictures "
        "--max_steps 5 --save_steps 2 --per_device_train_batch_size 4 --dataloader_drop_last true --learning_rate 1e-2 "
        "--logging_steps 1 --report_to none --use_cpu"
    ).split()
    whole, output = tmp_path / "whole", tmp_path / "out"
    main([*command, "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    main([*command, "--output_dir", str(output), "--resume_from_checkpoint", "true"])
    for name in (".", "checkpoint-4", "checkpoint-5"):
        assert differences(output / name, whole / name) == []


def test_the_best_checkpoint_outlives_the_interruption(folder, tmp_path):
    """Of two that are kept the best is one, and comes back at the end."""
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # the greatest loss, so that the first is the best
        "save_total_limit": 2,
    }
    whole = go_on(run(folder, tmp_path / "whole", **settings))
    assert Path(whole.state.best_model_checkpoint).name == "checkpoint-1"
    broken_off = run(folder, tmp_path / "cut", **settings)
    broken_off.add_callback(Interrupt(4, cut_off))
    with pytest.raises(SystemExit):
        go_on(broken_off)
    assert {path.name for path in (tmp_path / "cut").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    for seed in (1, 2):  # then once more, from the last step: the best is loaded there too
        go_on(run(folder, tmp_path / "cut", seed=seed, **settings))
        kept = {path.name for path in (tmp_path / "cut").glob("checkpoint-*")}
        assert kept == {"checkpoint-1", "checkpoint-6"}
        for name in (".", *kept):
            assert differences(tmp_path / "cut" / name, tmp_path / "whole" / name) == []


def test_a_run_saves_after_the_step_in_which_it_is_told_to_stop(folder, tmp_path):
    """What SIGTERM sets in motion, in the midst of a step; dropout has drawn its numbers by then."""
    go_on(run(folder, tmp_path / "whole"))
    stopped = run(folder, tmp_path / "out", enable_jit_checkpoint=True)
    handler = signal.getsignal(signal.SIGTERM)
    manager = handler.__self__
    stopped.add_callback(Interrupt(2, manager._enable_checkpoint))
    with pytest.raises(SystemExit) as exit_:
        go_on(stopped)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) != handler
    names = [f"checkpoint-{step}" for step in range(1, 7)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names[:3]
    go_on(run(folder, tmp_path / "out", seed=1))
    for name in (".", *names):
        assert differences(tmp_path / "out" / name, tmp_path / "whole" / name) == []


@pytest.mark.slow
def test_sigterm_is_a_pause(folder, tmp_path):
    """It comes into effect three seconds after the signal, some hundred steps later."""
    output, whole = tmp_path / "out", tmp_path / "whole"
    options = ["--max_steps", "600", "--save_steps", "20", "--save_total_limit", "2", "--enable_jit_checkpoint", "true"]
    command = [sys.executable, "-m", "lorgnette.trainer", *stage2(folder, output, *options)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not (output / "checkpoint-20").exists() and process.poll() is None:
            time.sleep(0.01)
        process.terminate()
        _, errors = process.communicate(timeout=900)
    assert process.returncode == 128 + signal.SIGTERM, errors[-3000:]
    step = max(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))
    assert f"SIGTERM: stopped after step {step} of 600, which is saved." in errors
    assert not (output / "config.json").exists()
    main(stage2(folder, output, *options, "--resume_from_checkpoint", "true"))
    main(stage2(folder, whole, *options))
    for name in (".", "checkpoint-580", "checkpoint-600"):
        assert differences(output / name, whole / name) == []


@pytest.mark.slow
def test_of_several_processes_all_stop_after_the_same_step(tmp_path):
    write_backbones(tmp_path)
    run_processes("sigterm_worker.py", tmp_path)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert fault_of(tmp_path / "out" / "checkpoint-2") is None


# ------------------------------------------------------------------------------------------------ the disk


@pytest.fixture
def mount(tmp_path):
    """Mounts a tmpfs with the given options on a folder, and says where; again, with others on the same."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    while os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # files of it may be mapped still


@pytest.mark.parametrize("room", [1.05, 1.5])
def test_a_full_disk_stops_the_run_and_with_room_it_goes_on(folder, tmp_path, mount, room):
    """There is room for the model of the first checkpoint, not for its optimizer; or for no second one."""
    checkpoint = folder / "whole" / "checkpoint-2"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    output = mount(f"size={int(room * size)}") / "out"
    with pytest.raises((OSError, RuntimeError, SafetensorError)) as caught:
        main(stage2(folder, output))
    cut = output / ("checkpoint-2" if room < 1.2 else "checkpoint-4")
    assert re.fullmatch(rf"{cut} is incomplete; its disk has [\d,]+ free bytes", caught.value.__notes__[0])
    assert fault_of(cut) is not None
    assert fault_of(output / "checkpoint-2") is None or cut.name == "checkpoint-2"
    subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(output.parent)], check=True)
    main(stage2(folder, output, "--resume_from_checkpoint", "true"))
    for name in (".", "checkpoint-4", "checkpoint-6"):
        assert differences(output / name, folder / "whole" / name) == []


@pytest.mark.parametrize("command", ["stage2", "cache"])
def test_a_folder_that_cannot_be_written_to_is_an_error_before_any_work(folder, mount, monkeypatch, command):
    output = mount("ro")
    arguments = stage2(folder, output)
    if command == "cache":
        arguments = f"cache --vision {folder}/vit --dataset {folder}/pictures --output_dir {output}".split()
        monkeypatch.setattr("lorgnette.trainer.cache._write_shard", None)  # it is not come to
    monkeypatch.setattr(Trainer, "train", None)
    with pytest.raises(OSError, match=str(output)) as caught:
        main(arguments)
    assert caught.value.errno == errno.EROFS


# ------------------------------------------------------------------------------------------------ the data


class Deadly(list):
    """Rows of which one is the end of the worker that reads it, as it would be if memory ran out."""

    main_process = os.getpid()

    def __getitem__(self, number):
        if number == 7 and os.getpid() != self.main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error(folder, tmp_path):
    broken = run(folder, tmp_path / "out", rows=Deadly(pairs()), dataloader_num_workers=1)
    started_at = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        go_on(broken)
    assert time.monotonic() - started_at < 300


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_row_of_a_stream_that_cannot_be_read_is_named(folder, tmp_path, workers):
    pictures = write_pairs(tmp_path / "pictures")
    (pictures / "7.png").write_bytes((pictures / "7.png").read_bytes()[:200])
    arguments = stage2(folder, tmp_path / "out", "--streaming", "--dataloader_num_workers", workers)
    arguments[arguments.index("--dataset") + 1] = str(pictures)
    with pytest.raises(ValueError, match=r"(?s)row 7: .*7\.png"):
        main(arguments)
