"""Which checkpoint a run goes on from: the newest that a killed process, a full disk or a cleanup left whole."""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..modeling.modeling_forms import BACKBONES


logger = logging.getLogger(__name__)

# What Trainer starts anew without a word where a checkpoint lacks it -> the files, of Trainer, FSDP or DeepSpeed
_NEEDED = {
    "config.json": ["config.json"],
    "weights (*.safetensors)": ["*.safetensors", "pytorch_model_fsdp*", "global_step*"],
    "optimizer.pt (save_only_model saves none)": ["optimizer*", "global_step*"],
    "scheduler.pt": ["scheduler.pt", "global_step*"],
    "rng_state.pth": ["rng_state*.pth"],
}


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint folder that training goes on from, or None for a fresh start.

    `resume_from_checkpoint: true` is the newest whole one in `output_dir`; what it passes over is logged with the
    cause. A bare Trainer takes the one with the highest number, whole or not.

    Raises:
        FileExistsError: `output_dir` holds an earlier run and `resume_from_checkpoint` is not set.
        FileNotFoundError: no checkpoint there is whole, or the one that was named is not; says why.
    """
    folder, wish = Path(args.output_dir), str(args.resume_from_checkpoint or "")
    checkpoints = sorted(folder.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]))
    if wish.lower() in ("", "false"):
        if args.should_save and (checkpoints or (folder / "config.json").exists()):
            raise FileExistsError(
                f"{folder} already holds a trained model or its checkpoints: choose another output_dir, delete this "
                "one, or go on from its last checkpoint with resume_from_checkpoint: true"
            )
        return None
    if wish.lower() != "true":
        if (fault := fault_of(Path(wish))) is not None:
            raise FileNotFoundError(f"resume_from_checkpoint: {wish} is not a complete checkpoint: {fault}")
        return wish
    passed_over = []
    for checkpoint in reversed(checkpoints):
        if (fault := fault_of(checkpoint)) is None:
            for reason in passed_over:
                logger.warning("%s; it is passed over, going on from %s.", reason, checkpoint.name)
            return str(checkpoint)
        passed_over.append(f"{checkpoint} is incomplete: {fault}")
    raise FileNotFoundError(
        "; ".join([f"resume_from_checkpoint is true, but {folder} holds no complete checkpoint", *passed_over])
    )


def fault_of(checkpoint: Path) -> str | None:
    """What keeps training from going on exactly from this folder; None where it is whole.

    Trainer writes `trainer_state.json` last, so a folder without it was cut off; one with it may have lost files since,
    to a deletion that was cut off (`save_total_limit`) or to a copy. So all that Trainer restores has to be there, and
    each file has to be as long as its format says. What the tensors hold is not read.
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
            elif path.suffix in (".pt", ".pth", ".bin"):  # what torch.save wrote
                zipfile.ZipFile(path).close()
        except (ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name} cannot be read ({error})"
    for what, patterns in _NEEDED.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"no {what}"
    return None


def check_backbones(checkpoint: str, model: PreTrainedModel) -> None:
    """See to it that a thin checkpoint, which has no backbones of its own, was trained on those of `model`.

    Raises:
        ValueError: it was trained on others; names both.
    """
    saved = PreTrainedConfig.get_config_dict(checkpoint)[0]
    if saved.get("saved_form") != "thin":
        return
    for part in model.backbones:
        what, prefix = BACKBONES[part]
        fields = (f"{prefix}_backbone", f"{prefix}_backbone_revision")
        theirs, ours = [saved[field] for field in fields], [getattr(model.config, field) for field in fields]
        if theirs != ours:
            raise ValueError(
                f"{checkpoint} was trained on the {what} {theirs[0]} at commit {theirs[1]}, and this run has {ours[0]} "
                f"at {ours[1]}: name the former, with its revision"
            )
