"""Every public path with the model on a device and inputs as users bring them: pictures, words, tensors of the CPU.

`python -m benchmarks.gpu` runs this on a GPU (`LORGNETTE_DEVICE=cuda`); here it runs on the CPU, and its answers are
compared with the CPU's.
"""

import os

import pytest
import tiny
import tiny_serving
import torch
from tiny_forms import form_of, hub_with_backbones, joined
from tiny_retrieval import retriever
from tiny_serving import BRIDGES, data_url, save_bridges, save_merged
from transformers import pipeline

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteImageToTextPipeline, LorgnetteProcessor
from lorgnette.serving.allowed_hosts import AllowedHosts
from lorgnette.serving.engine import InferenceEngine, Limits


DEVICE = os.environ.get("LORGNETTE_DEVICE", "cpu")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"
)
ASK = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
PICTURES = [tiny.picture(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`one` and `two`, whose LMs are the same, and `merged`."""
    made = tmp_path_factory.mktemp("models")
    save_bridges(made)
    save_merged(made / "one", made / "merged")
    return made


def loaded(folder, name="one"):
    model = LorgnetteForConditionalGeneration.from_pretrained(folder / name).eval()
    return model, LorgnetteProcessor.from_pretrained(folder / name)


def answers(model, processor) -> torch.Tensor:
    batch = processor(images=PICTURES, padding=True, return_tensors="pt").to(model.device)
    ids = model.generate(**batch, **ASK)
    assert ids.device.type == model.device.type
    return ids.cpu()


def assert_as_on_the_cpu(make):
    """The same ids: logits of these models are far enough apart."""
    on_cpu, processor = make()
    on_device, _ = make()
    assert torch.equal(answers(on_device.to(DEVICE), processor), answers(on_cpu, processor))


@pytest.mark.parametrize("name", ["one", "merged"])
def test_generate(folder, name):
    assert_as_on_the_cpu(lambda: loaded(folder, name))


def test_a_thin_model(tmp_path, monkeypatch):
    """Its backbones come from the Hub."""
    hub_with_backbones(tmp_path / "hub", monkeypatch)
    made = tmp_path / "thin"
    joined().save_pretrained(made, save_format="thin")
    assert form_of(made) == "thin"
    assert_as_on_the_cpu(lambda: loaded(tmp_path, "thin"))


def test_bridges(folder):
    model, processor = loaded(folder)
    model.to(DEVICE).load_bridge(folder / "two", "two")
    model.set_bridge("two")
    assert {parameter.device.type for parameter in model.parameters()} == {torch.device(DEVICE).type}
    expected, _ = loaded(folder, "two")
    assert torch.equal(answers(model, processor), answers(expected, processor))


def test_cached_features(folder):
    model, processor = loaded(folder)
    batch = processor(images=PICTURES, padding=True, return_tensors="pt").to(DEVICE)
    features = model.to(DEVICE).get_vision_features(batch.pop("pixel_values")).last_hidden_state
    ids = model.generate(**batch, vision_features=features, **ASK)
    assert torch.equal(ids.cpu(), answers(model, processor))


@pytest.mark.parametrize("task", ["image-to-text", "image-text-to-text"])
def test_pipelines(folder, task):
    found = []
    for device in (DEVICE, "cpu"):
        model, processor = loaded(folder)
        if task == "image-to-text":
            pipe = LorgnetteImageToTextPipeline(model, processor=processor, device=device)
            found.append(pipe(PICTURES, generate_kwargs=ASK))
        else:
            pipe = pipeline(task, model=model, processor=processor, device=device)
            found.append(pipe(images=PICTURES, text=[processor.build_prompt()] * 3, generate_kwargs=ASK))
    assert found[0] == found[1]


def test_a_worker_answers(folder):
    limits, hosts = Limits(max_new_tokens=4), AllowedHosts(internal=[])
    engine = InferenceEngine.load(
        folder / "one", {"two": folder / "two"}, name="one", device=DEVICE, limits=limits, hosts=hosts
    )
    with tiny_serving.serving(engine) as (url, _):
        for bridge in BRIDGES:
            asked = {"image_url": data_url(), "prompt": "Describe the picture.", "adapter": bridge}
            said = tiny_serving.httpx2.post(f"{url}/v1/vision", json=asked, timeout=60)
            assert said.status_code == 200, said.text


@pytest.mark.skipif(DEVICE == "cpu", reason="the CPU is the device here")
@pytest.mark.parametrize("left", ["input_ids", "pixel_values"])
def test_a_tensor_left_on_the_cpu_is_an_error(folder, left):
    """Of torch, as with any model of transformers: nothing is moved in silence."""
    model, processor = loaded(folder)
    batch = processor(images=PICTURES, padding=True, return_tensors="pt")
    moved = {name: tensor if name == left else tensor.to(DEVICE) for name, tensor in batch.items()}
    with pytest.raises(RuntimeError, match=r"device|torch\.FloatTensor"):
        model.to(DEVICE)(**moved)


def test_retrieve():
    asked = PICTURES, ["a cat", "the dog"]
    for rerank in (False, True):
        on_cpu, on_device = retriever().retrieve(*asked, rerank=rerank), retriever().to(DEVICE)
        found = on_device.retrieve(*asked, rerank=rerank)
        torch.testing.assert_close(found, on_cpu, atol=1e-3, rtol=1e-3)
