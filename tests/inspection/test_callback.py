"""Inspections during training: what trackers are told, and that training goes on as it would without."""

from collections import Counter
from uuid import uuid4

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_inspection import PicturesShuffled, rows, untrained
from tiny_training import trainer, write_backbones
from transformers import default_data_collator

from lorgnette.inspection.callback import InspectionCallback


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return write_backbones(tmp_path_factory.mktemp("backbones"))


def run(backbones, folder, inspect=True, **arguments):
    training = trainer(*untrained(backbones), folder, rows=rows(), max_steps=3, **arguments)
    callback = None
    if inspect:
        callback = InspectionCallback(training, rows(8), every=2)
        training.add_callback(callback)
    training.train()
    return training, callback


def losses(training):
    return [entry["loss"] for entry in training.state.log_history if "loss" in entry]


def test_figures_and_pictures_reach_the_tracker_and_training_is_not_disturbed(backbones, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    inspected, callback = run(backbones, tmp_path / "with", report_to="tensorboard")
    plain, _ = run(backbones, tmp_path / "without", inspect=False)
    assert losses(inspected) == losses(plain)
    assert len(losses(inspected)) == 3

    logged = [entry for entry in inspected.state.log_history if "inspection_frozen" in entry]
    assert [entry["step"] for entry in logged] == [2, 3]
    assert logged[0]["inspection_frozen"] == logged[0]["inspection_text_only"] == 1.0
    assert logged[0]["inspection_gradients_norms_Q-Former"] > 0
    assert {"inspection_sees_losses_right", "inspection_sees_gap", "inspection_queries_mean_cosine"} <= logged[0].keys()
    assert callback.last.model.endswith("step 3")
    assert sorted(path.name for path in (tmp_path / "with" / "inspection").iterdir()) == ["step-2.html", "step-3.html"]

    (board,) = {path.parent for path in (tmp_path / "board").rglob("events.out.*")}
    events = EventAccumulator(str(board), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("inspection/0")] == [2, 3]
    assert "train/inspection_sees_gap" in events.Tags()["scalars"]


def test_trackio_is_sent_pictures(backbones, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported for the first time
    from trackio.utils import MEDIA_DIR

    project = uuid4().hex  # an earlier run of the tests may have left one, where trackio was imported before
    run(backbones, tmp_path / "run", report_to="trackio", project=project)
    sent = Counter(path.relative_to(MEDIA_DIR).parts[:-1] for path in (MEDIA_DIR / project).rglob("*.png"))
    assert len({run_name for _, run_name, _ in sent}) == 1, "what is told after the run's end is another run"
    assert list(sent.values()) == [2, 2], "two pictures, at step 2 and at step 3"


def test_weights_and_biases_is_sent_pictures(backbones, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run(backbones, tmp_path / "run", report_to="wandb")
    wandb.finish()
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media/images/inspection")
    assert Counter(path.name[:1] for path in media.iterdir()) == {"0": 2, "1": 2}, "of both pictures, at both steps"


def test_what_a_collator_does_wrong_is_seen_in_training(backbones, tmp_path):
    training = trainer(*untrained(backbones), tmp_path, rows=rows(), max_steps=1)
    training.data_collator = PicturesShuffled(training.processing_class)
    callback = InspectionCallback(training, rows(8))
    training.add_callback(callback)
    training.train()
    assert "aligned" in {check.name for check in callback.last.failed}
    assert any("inspection_aligned" in entry for entry in training.state.log_history)


def test_rows_are_the_evaluation_datas_where_none_are_given(backbones, tmp_path):
    training = trainer(*untrained(backbones), tmp_path, rows=rows())
    assert [row["text"] for row in InspectionCallback(training).rows] == [row["text"] for row in training.eval_dataset]
    with pytest.raises(ValueError, match="every is 0"):
        InspectionCallback(training, every=0)
    training.data_collator = default_data_collator
    with pytest.raises(TypeError, match="LorgnetteCollator is needed"):
        InspectionCallback(training)
