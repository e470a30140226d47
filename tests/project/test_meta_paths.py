"""What users call, with the model on `meta`: no tensor that these paths make is elsewhere, but for what goes out."""

import pytest
import tiny
import torch
from devices import OneDevice, answer_on_meta
from tiny_retrieval import batch, retriever
from tiny_serving import BRIDGES, data_url, httpx2, save_bridges, save_merged, serving
from transformers import pipeline

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteImageToTextPipeline, LorgnetteProcessor
from lorgnette.modeling import modeling_retrieval
from lorgnette.serving.allowed_hosts import AllowedHosts
from lorgnette.serving.batching import Batcher
from lorgnette.serving.engine import InferenceEngine, Limits


pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # which another LoRA does
PICTURES = [tiny.picture(seed) for seed in range(3)]
ASK = {"max_new_tokens": 2, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`one` and `two`, whose LMs are the same, and `merged`."""
    made = tmp_path_factory.mktemp("models")
    save_bridges(made)
    save_merged(made / "one", made / "merged")
    return made


@pytest.fixture
def meta(monkeypatch, folder):
    answer_on_meta(monkeypatch)
    unfinished = [True, False]  # what generate asks before each token
    monkeypatch.setattr(
        LorgnetteForConditionalGeneration,
        "_has_unfinished_sequences",
        lambda *_, **__: unfinished.pop(0) if unfinished else False,
    )
    return unfinished


def on_meta(folder, name="one"):
    model = LorgnetteForConditionalGeneration.from_pretrained(folder / name).eval().to("meta")
    return model, processor_of(folder, name)


def processor_of(folder, name="one") -> LorgnetteProcessor:
    return LorgnetteProcessor.from_pretrained(folder / name)


def asked(model, processor, **settings) -> torch.Tensor:
    made = processor(images=PICTURES, padding=True, return_tensors="pt").to("meta")
    with OneDevice():
        return model.generate(**made, **ASK | settings)


@pytest.mark.parametrize("name", ["one", "merged"])
def test_generate(folder, name, meta):
    ids = asked(*on_meta(folder, name))
    assert ids.is_meta
    assert len(ids) == len(PICTURES)


def test_another_bridge_and_no_adapter(folder, meta):
    model, processor = LorgnetteForConditionalGeneration.from_pretrained(folder / "one"), processor_of(folder)
    model.load_bridge(folder / "two", "two")
    model.eval().to("meta").set_bridge("two")  # which is on the CPU until it is used
    assert all(parameter.is_meta for parameter in model.parameters())
    assert asked(model, processor).is_meta
    with model.disable_adapter():
        assert asked(model, processor).is_meta


def test_sampling(folder, meta):
    model, processor = on_meta(folder)
    assert asked(model, processor, do_sample=True, top_k=3).is_meta


@pytest.mark.parametrize("task", ["image-to-text", "image-text-to-text"])
def test_pipelines(folder, task, meta):
    model, processor = on_meta(folder)
    if task == "image-to-text":
        pipe = LorgnetteImageToTextPipeline(model, processor=processor, device="meta")
        with OneDevice():
            said = pipe(PICTURES, batch_size=1, generate_kwargs=ASK)
    else:
        pipe = pipeline(task, model=model, processor=processor, device="meta")
        prompts = [processor.build_prompt()] * len(PICTURES)
        with OneDevice():
            said = pipe(images=PICTURES, text=prompts, generate_kwargs=ASK)
    assert len(said) == len(PICTURES)


def test_a_worker(folder, meta, monkeypatch):
    answer, failed = Batcher._answer, []

    def on_one_device(self, requests):  # in the worker's own thread
        meta[:] = [True, False]
        try:
            with OneDevice():
                answer(self, requests)
        except Exception as error:
            failed.append(error)
            raise

    monkeypatch.setattr(Batcher, "_answer", on_one_device)
    engine = InferenceEngine.load(
        folder / "one",
        {"two": folder / "two"},
        name="one",
        device="meta",
        limits=Limits(max_new_tokens=1),
        hosts=AllowedHosts(internal=[]),
    )
    with serving(engine) as (url, _):
        for bridge in BRIDGES:
            question = {"image_url": data_url(), "prompt": "Describe the picture.", "adapter": bridge}
            said = httpx2.post(f"{url}/v1/vision", json=question, timeout=60)
            assert not failed, failed
            assert said.status_code == 200, said.text


@pytest.mark.parametrize("mode", ["features", "pictures"])
def test_retrieve_with_reranking(mode, meta, monkeypatch):
    """Which pairs are the best is a value: here the first of each."""
    pairs = torch.tensor([[0, 0], [1, 1], [2, 0]], device="meta")
    monkeypatch.setattr(modeling_retrieval, "_best_pairs", lambda *_: pairs)
    built, pictures = retriever(), PICTURES
    if mode == "features":
        pictures = built.get_vision_features(batch()["pixel_values"][:3]).last_hidden_state
    built.to("meta")
    with OneDevice():
        scores = built.retrieve(pictures, ["a cat", "the dog"], rerank=True)
    assert scores.shape == (3, 2)


def test_stage_1_without_losses(meta):
    built = retriever().to("meta").eval()
    made = {name: tensor.to("meta") for name, tensor in batch().items()}
    with OneDevice():
        assert built(**made, return_loss=False).logits_per_image.is_meta


def test_what_is_left_on_the_cpu_is_refused(folder, meta):
    model, processor = on_meta(folder)
    made = processor(images=PICTURES, padding=True, return_tensors="pt")
    with OneDevice(), pytest.raises(RuntimeError, match="tensors on cpu, meta"):
        model.generate(**made, **ASK)
