"""An IterableDataset in the stock Trainer: accelerate's dispatcher, which cuts batches, loses nothing of ours."""

import pytest
import torch
from accelerate.utils import TensorInformation
from ddp_stream_worker import Stream
from processes import run_processes
from tiny import picture
from tiny_training import joined, pairs, trainer, write_backbones

from lorgnette import LorgnetteCollator
from lorgnette.trainer import unsupported


SAME = "one picture in all rows"
WORDS = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]


def rows_of(pictures: list[int] | str, count: int = 8) -> list[dict]:
    """Rows with so many pictures each, over and over; 0 for a chat without any."""
    rows = pairs(count)
    if pictures == SAME:
        shown = picture(0)
        return [row | {"image": shown} for row in rows]
    made = []
    for row in rows:
        number = pictures[row["index"] % len(pictures)]
        images = [picture(10 * row["index"] + n) for n in range(number)]
        made.append(row | {"image": images} if images else {"index": row["index"], "messages": WORDS})
    return made


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> tuple[str, str]:
    return write_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.mark.parametrize(
    ("pictures", "settings", "accelerator"),
    [
        ([1], {}, {}),
        ([2], {}, {}),
        ([1, 2, 3], {}, {"split_batches": True}),
        ([0, 3, 0, 1], {}, {}),
        (SAME, {}, {}),
        ([1, 2], {"pack_to": 200}, {}),
        ([1, 2], {"pad_to_multiple_of": 16}, {}),
        ([2], {"pack_to": 200, "pad_to_multiple_of": 16}, {"dispatch_batches": False}),
    ],
)
def test_a_stream_trains_and_evaluates_as_a_list_of_its_rows(backbones, tmp_path, pictures, settings, accelerator):
    found = []
    for kind in (list, Stream):
        torch.manual_seed(0)
        run = trainer(
            *joined(backbones, dropout=0.0),
            tmp_path,
            rows=kind(rows_of(pictures)),
            train_sampling_strategy="sequential",
            accelerator_config=accelerator,
        )
        run.data_collator = LorgnetteCollator(run.processing_class, **settings)
        run.eval_dataset = kind(rows_of(pictures))
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        found.append([*losses, run.evaluate()["eval_loss"]])
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_batches_for_several_processes_are_not_cut_into_shares(monkeypatch):
    batch = unsupported.Batch.of({"input_ids": torch.zeros(2, 5), "pixel_values": torch.zeros(3, 4)})
    assert list(batch) == ["pixel_values", "input_ids"]
    structure = {name: TensorInformation(shape=value.shape, dtype=value.dtype) for name, value in batch.items()}
    unsupported.Batch(structure)  # on one process nothing is cut off
    monkeypatch.setitem(unsupported.PartialState._shared_state, "num_processes", 2)
    unsupported.Batch(batch)
    with pytest.raises(ValueError, match=r'shares for 2: .*accelerator_config=\{"dispatch_batches": False\}'):
        unsupported.Batch(structure)


@pytest.mark.slow
def test_two_processes_read_each_row_once(tmp_path):
    write_backbones(tmp_path)
    run_processes("ddp_stream_worker.py", tmp_path)


@pytest.mark.slow
def test_two_processes_refuse_to_be_given_shares(tmp_path):
    write_backbones(tmp_path)
    (tmp_path / "dispatched").mkdir()
    with pytest.raises(AssertionError):  # a status that is not 0
        run_processes("ddp_stream_worker.py", tmp_path)
    error = (tmp_path / "dispatched" / "error.txt").read_text()
    assert error.startswith("step 0: accelerate reads batches on one process")
    assert 'accelerator_config={"dispatch_batches": False}' in error
