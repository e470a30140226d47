"""Send pictures and tables to the Trainer's trackers; the Trainer itself sends only numbers."""

from collections.abc import Mapping, Sequence
from functools import singledispatch

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


Row = Sequence[str | int]


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


@singledispatch
def send_table(tracker: TrainerCallback, name: str, columns: Sequence[str], rows: Sequence[Row], step: int) -> None:
    """Send a table to a tracker, at the Trainer's global step; see [`send_pictures`]."""


@send_table.register
def _(tracker: TensorBoardCallback, name: str, columns: Sequence[str], rows: Sequence[Row], step: int) -> None:
    lines = [columns, ["---"] * len(columns), *rows]
    tracker.tb_writer.add_text(name, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), step)


@send_table.register
def _(tracker: TrackioCallback, name: str, columns: Sequence[str], rows: Sequence[Row], step: int) -> None:
    table = tracker._trackio.Table(columns=list(columns), data=[list(row) for row in rows])
    tracker._trackio.log({name: table, "train/global_step": step})


@send_table.register
def _(tracker: WandbCallback, name: str, columns: Sequence[str], rows: Sequence[Row], step: int) -> None:
    table = tracker._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
    tracker._wandb.log({name: table, "train/global_step": step})
