"""Send pictures to the Trainer's trackers; the Trainer itself sends only numbers."""

from collections.abc import Mapping
from functools import singledispatch

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


@singledispatch
def send_pictures(tracker: TrainerCallback, pictures: Mapping[str, Image.Image], step: int) -> None:
    """Send named pictures to a tracker, at the Trainer's global step.

    Args:
        tracker: a reporting callback of `transformers.integrations`; other classes get nothing.
    """


@send_pictures.register
def _(tracker: TensorBoardCallback, pictures: Mapping[str, Image.Image], step: int) -> None:
    for name, picture in pictures.items():
        tracker.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")


@send_pictures.register
def _(tracker: TrackioCallback, pictures: Mapping[str, Image.Image], step: int) -> None:
    wrapped = {name: tracker._trackio.Image(picture) for name, picture in pictures.items()}
    tracker._trackio.log({**wrapped, "train/global_step": step})


@send_pictures.register
def _(tracker: WandbCallback, pictures: Mapping[str, Image.Image], step: int) -> None:
    wrapped = {name: tracker._wandb.Image(picture) for name, picture in pictures.items()}
    tracker._wandb.log({**wrapped, "train/global_step": step})
