"""Keep Trainer's pushes to the Hub clean, and complete their card."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ..assembly.card_metadata import complete_card
from ..assembly.endpoint import write_endpoint
from ..modeling.modeling_saving import resolve_save_format
from .progress import SAMPLES, THUMBNAILS
from .provenance import HELD_OUT
from .unreadable import CHECK_REPORT, REPORT


_GITIGNORE = ".gitignore"
# a pickle, files with paths and host names of this machine, pictures and texts of the training data, and the .gitignore
# itself, which would affect later uploads
_STAYS_HERE = (TRAINING_ARGS_NAME, TRAINER_STATE_NAME, REPORT, CHECK_REPORT, HELD_OUT, SAMPLES, f"{THUMBNAILS}/")
_STAYS_HERE += ("runs/", _GITIGNORE)


class CleanPush(TrainerCallback):
    """Excludes Trainer's pickled arguments, states and logs from each push.

    Trainer uploads its `output_dir`, and the Hub skips files that its `.gitignore` names. An existing `.gitignore` gets
    these lines at the start.
    """

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if kwargs["model"].can_generate():
            write_endpoint(args.output_dir)
        path, lines = Path(args.output_dir, _GITIGNORE), [f"/{name}" for name in _STAYS_HERE]
        existing = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(dict.fromkeys([*lines, *existing])) + "\n", encoding="utf-8")


def push_card(trainer: Trainer) -> None:
    """After Trainer's push, complete its card with the model's metadata, and push the card.

    Raises:
        FileNotFoundError: Trainer has not pushed.
        HfHubHTTPError: the Hub refuses it.
    """
    if not trainer.is_world_process_zero():
        return
    path, model = Path(trainer.args.output_dir, "README.md"), trainer.accelerator.unwrap_model(trainer.model)
    card = ModelCard.load(path, ignore_metadata_errors=True)
    complete_card(card, model.config, resolve_save_format(model, None))
    card.save(path)
    where = {"token": trainer.args.hub_token, "revision": trainer.args.hub_revision}
    card.push_to_hub(trainer.hub_model_id, commit_message="Complete the card", **where)
