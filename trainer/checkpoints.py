"""Resume a run exactly, from its newest complete checkpoint."""

import json
import logging
import shutil
import signal
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..modeling.modeling_loss import in_process_group
from ..modeling.modeling_saving import BACKBONES
from .local_backbones import Source, describe, is_local, source_in


logger = logging.getLogger(__name__)

# state that Trainer silently initialises if it is missing -> its files, of Trainer, FSDP or DeepSpeed
_NEEDED = {
    "config.json": ["config.json"],
    "weights (*.safetensors)": ["*.safetensors", "pytorch_model_fsdp*", "global_step*"],
    "optimizer.pt (save_only_model saves none)": ["optimizer*", "global_step*"],
    "scheduler.pt": ["scheduler.pt", "global_step*"],
    "rng_state.pth": ["rng_state*.pth"],
}


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint folder to resume from, or None for a fresh start.

    `resume_from_checkpoint: true` selects the newest complete one in `output_dir`, and logs the incomplete ones with
    the cause. A run that was killed before its first complete checkpoint starts again, so that the same command starts
    and resumes a run. A bare Trainer takes the checkpoint with the highest number, complete or not.

    Raises:
        FileExistsError: `output_dir` holds an earlier run and `resume_from_checkpoint` is not set.
        FileNotFoundError: no checkpoint is complete although one was, or there is a trained model; or the named
            checkpoint is incomplete. With the cause.
    """
    folder, wish = Path(args.output_dir), str(args.resume_from_checkpoint or "")
    checkpoints = sorted(folder.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]))
    if wish.lower() in ("", "false"):
        if args.should_save and (checkpoints or (folder / CONFIG_NAME).exists()):
            raise FileExistsError(
                f"{folder} already holds a trained model or its checkpoints: choose another output_dir, delete this "
                "one, or continue from its last checkpoint with resume_from_checkpoint: true"
            )
        return None
    if wish.lower() != "true":
        if (fault := fault_of(Path(wish))) is not None:
            raise FileNotFoundError(f"resume_from_checkpoint: {wish} is not a complete checkpoint: {fault}")
        return wish
    skipped = []
    for checkpoint in reversed(checkpoints):
        if (fault := fault_of(checkpoint)) is None:
            for reason in skipped:
                logger.warning("%s; skipping it, resuming from %s.", reason, checkpoint.name)
            return str(checkpoint)
        skipped.append(f"{checkpoint} is incomplete: {fault}")
    if not (folder / CONFIG_NAME).exists() and not any((path / TRAINER_STATE_NAME).exists() for path in checkpoints):
        cut_off = "; ".join([f"{folder} holds no complete checkpoint to resume from", *skipped])
        logger.warning("%s. Training starts from the beginning.", cut_off)
        return None
    raise FileNotFoundError(
        "; ".join([f"resume_from_checkpoint is true, but {folder} holds no complete checkpoint", *skipped])
    )


def fault_of(checkpoint: Path) -> str | None:
    """Why training cannot resume exactly from this folder; None if it is complete.

    Trainer writes `trainer_state.json` last, so a folder without it is incomplete; one with it may have lost files
    later, by an interrupted deletion (`save_total_limit`) or copy. So every file that Trainer restores has to exist and
    to have the length that its format says. Tensors are not read.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"no {TRAINER_STATE_NAME}"
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if path.name == SAFE_WEIGHTS_INDEX_NAME:
                    for shard in sorted(set(content["weight_map"].values())):
                        if not path.with_name(shard).is_file():
                            return f"no {shard}, which {path.name} lists"
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):  # written by torch.save
                zipfile.ZipFile(path).close()
        except (ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name} cannot be read ({error})"
    for what, patterns in _NEEDED.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"no {what}"
    # each process writes its own file; the first, which writes the state, does not wait for them
    of = {int(path.stem.rpartition("_")[2]) for path in checkpoint.glob("rng_state_*[0-9].pth")}
    if of and (absent := set(range(max(2, max(of) + 1))) - of):
        return f"no rng_state_{min(absent)}.pth"
    return None


def check_backbones(checkpoint: str, model: PreTrainedModel, sources: Mapping[str, Source] | None = None) -> None:
    """Check that a thin checkpoint, one without the backbones, was trained on the backbones of `model`.

    Args:
        sources: of its local backbones, see [`~lorgnette.trainer.local_backbones.local_sources`]. A folder may have
            moved: its fingerprint counts.

    Raises:
        ValueError: it was trained on others; with both names.
    """
    saved = PreTrainedConfig.get_config_dict(checkpoint)[0]
    if saved.get("saved_form") != "thin":
        return
    for part in model.backbones:
        theirs, ours = source_in(saved, part), (sources or {}).get(part) or source_in(model.config, part)
        if theirs != ours and not (is_local(theirs) and theirs[1] == ours[1]):
            how = "use the files that it was trained on, or another output_dir for a new run"
            raise ValueError(
                f"{checkpoint} was trained on the {BACKBONES[part][0]} {describe(theirs)}, and this run's is "
                f"{describe(ours)}: {how if is_local(theirs) else 'use the former, with its revision'}"
            )


def train_from(trainer: Trainer, checkpoint: str | None) -> None:
    """`trainer.train` from a checkpoint or, with None, from the start, so that an interruption does not change results.

    It corrects two behaviours of Trainer: from a checkpoint of the last step Trainer takes one more step; on SIGTERM,
    with `enable_jit_checkpoint`, it saves within a step, and dropout differs when the step is repeated.

    Raises:
        SystemExit: SIGTERM stopped it before the last step, after a save; or Ctrl-C. With the shell's status.
    """
    trainer.add_callback(_LastStep())
    on_sigterm = None
    if (stock := trainer.pop_callback(JITCheckpointCallback)) is not None:
        trainer.add_callback(on_sigterm := _OnSigterm(stock))
    if checkpoint is not None:
        logger.info("training resumes from %s", checkpoint)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        _log_interruption(trainer)
        raise SystemExit(128 + signal.SIGINT) from None
    except (OSError, RuntimeError, SafetensorError) as error:
        incomplete = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
        if incomplete.is_dir() and fault_of(incomplete) is not None:  # torch does not report a full disk
            error.add_note(
                f"{incomplete} is incomplete; its disk has {shutil.disk_usage(incomplete).free:,} free bytes"
            )
        raise
    except _AlreadyFinishedError:
        logger.info("%s is of the last step: nothing is left to train.", checkpoint)
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if on_sigterm is not None and on_sigterm.was_signalled and step < steps:
        logger.warning("SIGTERM: stopped after step %d of %d, which is saved.", step, steps)
        raise SystemExit(128 + signal.SIGTERM)


def _log_interruption(trainer: Trainer) -> None:
    folder, step, steps = Path(trainer.args.output_dir), trainer.state.global_step, trainer.state.max_steps
    found = sorted(folder.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    newest = next((path for path in found if fault_of(path) is None), None)
    kept = "no checkpoint is complete yet" if newest is None else f"the newest complete checkpoint is {newest}"
    again = "the same command starts again" if not found else "--resume_from_checkpoint true continues from it"
    if found and newest is None:
        again = "--resume_from_checkpoint true starts again"
    logger.warning("Interrupted after step %d of %d; %s: %s.", step, steps, kept, again)


class _AlreadyFinishedError(Exception):
    """The loaded checkpoint is of the last step."""


class _LastStep(TrainerCallback):
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise _AlreadyFinishedError


class _OnSigterm(TrainerCallback):
    """Saves after the step, after logging and evaluation, and stops; all processes stop after the same step."""

    def __init__(self, stock: JITCheckpointCallback):
        self.stock, self.was_signalled = stock, False  # its signal handler is installed

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        was_signalled = torch.tensor(float(self.stock.jit_manager.is_checkpoint_requested), device=args.device)
        if in_process_group():
            dist.all_reduce(was_signalled, dist.ReduceOp.MAX)
        self.was_signalled = bool(was_signalled)
        control.should_save |= self.was_signalled

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.was_signalled

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.stock.on_train_end(*args, **kwargs)
