"""`handler.py`, which goes along with every upload, as the runtime of Inference Endpoints uses it."""

import base64
import importlib.util
import io
import json
import subprocess
import sys
import tomllib

import huggingface_hub
import pytest
from huggingface_hub import InferenceClient
from packaging.requirements import Requirement
from PIL import Image
from repository import ROOT
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tiny import picture
from tiny_serving import MAX_NEW_TOKENS, data_url, png, save_bridges, save_merged, serving_app
from without_lorgnette import WITHOUT_LORGNETTE

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor
from lorgnette.assembly.endpoint import REQUIREMENTS, write_endpoint
from lorgnette.processing.pipeline_lorgnette import LorgnetteImageToTextPipeline
from lorgnette.publishing.guards import check_folder
from lorgnette.serving.payloads import VisionRequest


# The runtime gives the module this name and puts the folder first on the path.
AS_THE_RUNTIME = """
import importlib.util, json, sys
folder, request, again = sys.argv[1:]
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder + "/handler.py")
sys.path.insert(0, folder)
module = importlib.util.module_from_spec(spec)
sys.modules["handler.EndpointHandler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)
print(json.dumps(handler(json.loads(request))))
handler.model.save_pretrained(again)
"""
ASKED = {"image_url": data_url(), "prompt": "What is this?", "max_new_tokens": MAX_NEW_TOKENS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bridges")
    save_bridges(made)
    write_endpoint(made / "one")
    return made / "one"


def load(folder):
    """The handler's module, with the folder first on the path, as the runtime has it."""
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def handler(folder):
    return load(folder).EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def expected(folder):
    model = LorgnetteForConditionalGeneration.from_pretrained(folder).eval()
    pipe = LorgnetteImageToTextPipeline(model=model, processor=LorgnetteProcessor.from_pretrained(folder))
    settings = {"prompt": ASKED["prompt"], "max_new_tokens": MAX_NEW_TOKENS, "generate_kwargs": {"do_sample": False}}
    with_lora = pipe(picture(), **settings)[0]["generated_text"]
    with model.disable_adapter():
        return {True: with_lora, False: pipe(picture(), **settings)[0]["generated_text"]}


@pytest.fixture(scope="module")
def caption(folder):
    """What the pipeline says to the processor's own query."""
    model = LorgnetteForConditionalGeneration.from_pretrained(folder).eval()
    pipe = LorgnetteImageToTextPipeline(model=model, processor=LorgnetteProcessor.from_pretrained(folder))
    return pipe(picture(), max_new_tokens=MAX_NEW_TOKENS, generate_kwargs={"do_sample": False})[0]["generated_text"]


@pytest.mark.parametrize("use_lora", [True, False])
def test_it_answers_as_the_worker_does(handler, expected, use_lora):
    assert expected[True] != expected[False]
    for payload in (
        {"inputs": ASKED | {"use_lora": use_lora}},
        ASKED | {"use_lora": use_lora, "adapter": "default", "stream": False},
    ):
        answer = handler(payload)
        assert answer["text"] == expected[use_lora]
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert (answer["adapter"], answer["finish_reason"] in ("stop", "length")) == ("default", True)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"image_url": "http://127.0.0.1:9/a.png"}, OSError, "not on the public internet"),
        ({"image_url": "http://[::ffff:169.254.169.254]/"}, OSError, "not on the public internet"),
        ({"image_url": "/etc/passwd"}, ValueError, "begins with http://"),
        ({"image_url": None}, ValueError, "image_url is missing"),
        ({"prompt": 5}, ValueError, "prompt is a int; a str is needed"),
        ({"prompt": " "}, ValueError, "is empty"),
        ({"prompt": "a" * 2**20}, ValueError, "1048576 characters"),
        ({"prompt": "a" * 999}, ValueError, r"\d+ tokens and 8 new ones are more than the 256"),
        ({"adapter": "two"}, ValueError, "no adapter 'two'; there is default"),
        ({"use_lora": 2}, ValueError, "use_lora is a int"),
        ({"use_lora": "no"}, ValueError, "use_lora is a str"),
        ({"max_new_tokens": True}, ValueError, "max_new_tokens is a bool"),
        ({"max_new_tokens": "8x"}, ValueError, "max_new_tokens is a str"),
        ({"max_new_tokens": "0"}, ValueError, "max_new_tokens is 0; it runs from 1 to 128"),
        ({"image_url": 5}, ValueError, "image_url is a int"),
        ({"image_url": "http://" + "a" * 9000}, ValueError, "image_url has 9007 characters; 8192 are allowed"),
        ({"max_new_tokens": 1000}, ValueError, "runs from 1 to 128"),
        ({"temperature": 1}, ValueError, "no field 'temperature'"),
        ({"stream": True}, ValueError, "stream is true"),
    ],
)
def test_bad_requests(handler, changed, kind, message):
    with pytest.raises(kind, match=message):
        handler({"inputs": ASKED | changed})


def test_lora_that_was_merged_cannot_be_left_out(folder, expected, tmp_path):
    save_merged(folder, tmp_path)
    write_endpoint(tmp_path)
    handler = load(tmp_path).EndpointHandler(str(tmp_path))
    assert handler(ASKED)["text"] == expected[True]
    with pytest.raises(ValueError, match="saved merged: LoRA is part of the LM"):
        handler(ASKED | {"use_lora": False})


def test_it_takes_the_workers_fields(folder):
    assert load(folder).FIELDS.keys() == VisionRequest.model_fields.keys()


@pytest.mark.parametrize("inputs", [5, None, [data_url()], True])
def test_no_object(handler, inputs):
    kind = type(inputs).__name__
    with pytest.raises(ValueError, match=rf"an object with image_url, prompt, .* is needed, not a {kind}"):
        handler({"inputs": inputs})


@pytest.mark.parametrize(
    ("use_lora", "means"), [("1", True), ("True", True), (1, True), ("0", False), ("false", False), (0, False)]
)
def test_values_as_forms_have_them(handler, expected, use_lora, means):
    asked = ASKED | {"use_lora": use_lora, "max_new_tokens": str(MAX_NEW_TOKENS), "stream": "0"}
    assert handler({"inputs": asked})["text"] == expected[means]


BARE = data_url().partition(",")[2]
LIMIT = {"max_new_tokens": MAX_NEW_TOKENS}
PICTURES = {
    "what the runtime makes of image/png": picture(),
    "raw bytes": png(picture()),
    "a data URL": data_url(),
    "base64": BARE,
    "base64 without padding": BARE.rstrip("="),
    "URL-safe base64": BARE.replace("+", "-").replace("/", "_"),
    "a bytearray": bytearray(png(picture())),
    "a file": io.BytesIO(png(picture())),
    "base64 in lines": "\n".join(BARE[start : start + 76] for start in range(0, len(BARE), 76)) + "\n",
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_alone(handler, caption, kind):
    image = PICTURES[kind]
    for parameters in (
        LIMIT,
        {"generate_kwargs": LIMIT | {"do_sample": False}},
        {"generation_parameters": LIMIT | {"temperature": None}},
    ):
        (answer,) = handler({"inputs": image, "parameters": parameters})
        assert answer["generated_text"] == caption
        assert answer["usage"]["completion_tokens"] <= MAX_NEW_TOKENS
    assert handler({"inputs": image})[0]["generated_text"].startswith(caption)
    asked = LIMIT | {"prompt": ASKED["prompt"], "use_lora": "0"}
    (with_prompt,) = handler({"inputs": image, "parameters": asked})
    with_prompt["text"] = with_prompt.pop("generated_text")
    assert with_prompt == handler({"inputs": ASKED | {"use_lora": False}})


def test_huggingface_hubs_image_to_text(handler, caption, monkeypatch, tmp_path):
    """The client itself, by an Endpoint's URL; the toolkit makes a picture of a body of type `image/…`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it would ask nobody at all

    async def endpoint(request: Request) -> JSONResponse:
        assert request.headers["content-type"] == "image/png"
        image = Image.open(io.BytesIO(await request.body()))
        return JSONResponse(handler({"inputs": image}))

    picture().save(tmp_path / "cat.png")
    with serving_app(Starlette(routes=[Route("/", endpoint, methods=["POST"])])) as (url, _):
        answer = InferenceClient(url).image_to_text(tmp_path / "cat.png")
    assert answer.generated_text.startswith(caption)


def test_huggingface_hubs_visual_question_answering(handler, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    async def endpoint(request: Request) -> JSONResponse:
        return JSONResponse(handler(await request.json()))

    picture().save(tmp_path / "cat.png")
    with serving_app(Starlette(routes=[Route("/", endpoint, methods=["POST"])])) as (url, _):
        for top_k in (None, 1):
            (answer,) = InferenceClient(url).visual_question_answering(
                tmp_path / "cat.png", ASKED["prompt"], top_k=top_k
            )
            assert (
                answer.answer
                == handler({"inputs": BARE, "parameters": {"prompt": ASKED["prompt"]}})[0]["generated_text"]
            )
    assert answer.answer != handler({"inputs": BARE})[0]["generated_text"]


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (
            {"prompt": "What?"},
            "no field 'prompt' beside inputs, but image, inputs, options, parameters, question",
        ),
        ({"use_lora": False}, "no field 'use_lora' beside inputs"),
        ({"image": data_url()}, "image is another picture than inputs"),
        ({"question": 5}, "prompt is a int"),
        ({"question": "What?", "parameters": {"prompt": "Who?"}}, "prompt is given twice"),
        ({"inputs": ASKED, "question": "What?"}, "no field 'question' beside inputs, but inputs, options, par"),
    ],
)
def test_what_stands_beside_inputs_is_not_passed_over(handler, beside, message):
    with pytest.raises(ValueError, match=message):
        handler({"inputs": BARE} | beside)
    assert handler({"inputs": ASKED, "options": {"wait_for_model": True}})["text"]


@pytest.mark.parametrize("image", [picture(), png(picture())])
def test_a_picture_in_place_of_its_url(handler, expected, image):
    """What newer runtimes make of base64 in the fields of an image task."""
    assert handler({"inputs": ASKED | {"image_url": image}})["text"] == expected[True]


def test_a_url_alone_is_fetched(handler):
    for url in ("http://127.0.0.1:9/aaaa", "HTTP://127.0.0.1:9/aaaa"):
        with pytest.raises(OSError, match="not on the public internet"):
            handler({"inputs": url})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (base64.b64encode(b"my own secret words").decode(), "is no picture that is read here"),
        ("data:image/png;base64," + base64.b64encode(b"my own secret words").decode(), "is no picture that is read"),
        (b"my own secret words", "is no picture that is read here"),
        ("my own secret words, no base64", "inputs is neither an http, https or data URL nor base64"),
        ("data:image/png;base64,my own secret words", "not valid base64"),
        ("/etc/my-own-secret-words", "inputs is neither|is no picture"),
        ("", "empty"),
        (Image.new("1", (10_000, 10_000)), "10000 x 10000 pixels are more than the 50000000"),
        ({"image_url": "my own secret words", "prompt": "What?"}, "image_url begins with http://, https:// or data:"),
        ({"image_url": b"my own secret words", "prompt": "What?"}, "is no picture that is read here"),
    ],
)
def test_what_is_no_picture_is_not_repeated(handler, inputs, message):
    with pytest.raises(ValueError, match=message) as told:
        handler({"inputs": inputs})
    assert "secret" not in str(told.value)
    assert len(str(told.value)) < 300


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_new_tokens": 1000}, "max_new_tokens is 1000; it runs from 1 to 128"),
        ({"max_new_tokens": 2, "generate_kwargs": {"max_new_tokens": 2}}, "max_new_tokens is given twice"),
        ({"image_url": data_url()}, "image_url is given twice"),
        ({"temperature": 0.7}, "no field 'temperature'"),
        ({"generate_kwargs": {"top_k": 5}}, "top_k may be 1 alone"),
        ({"generate_kwargs": {"generate_kwargs": {}}}, "no field 'generate_kwargs'"),
        ({"do_sample": True}, "do_sample may be False alone"),
        ({"generate_kwargs": {"num_beams": 4}}, "num_beams may be 1 alone"),
        ({"generate_kwargs": 5}, "generate_kwargs is a int; an object is needed"),
        ([], "parameters is a list; an object is needed"),
        ({"prompt": " "}, "is empty"),
    ],
)
def test_parameters_that_cannot_be_used(handler, parameters, message):
    with pytest.raises(ValueError, match=message):
        handler({"inputs": BARE, "parameters": parameters})


def test_parameters_beside_fields(handler, expected):
    asked = {"image_url": ASKED["image_url"], "prompt": ASKED["prompt"]}
    assert handler({"inputs": asked, "parameters": LIMIT})["text"] == expected[True]
    assert handler({"inputs": ASKED, "parameters": {}})["text"] == expected[True]
    with pytest.raises(ValueError, match="max_new_tokens is given twice"):
        handler({"inputs": ASKED, "parameters": {"max_new_tokens": 3}})


def test_what_goes_along_may_be_published(folder):
    (folder / "README.md").write_text("A model.", encoding="utf-8")
    assert {"handler.py", "web_images.py", "requirements.txt"} <= set(check_folder(folder))
    lines = {Requirement(line).name: line for line in (folder / "requirements.txt").read_text().splitlines()}
    assert list(lines) == ["transformers", "peft", "pillow", "safetensors"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(lines.values()) == set(REQUIREMENTS) <= set(project["dependencies"])


@pytest.mark.slow
def test_where_lorgnette_is_not_installed(folder, expected, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_LORGNETTE + AS_THE_RUNTIME, str(folder), json.dumps({"inputs": ASKED}), "again"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads(finished.stdout.splitlines()[-1])["text"] == expected[True]
    assert (tmp_path / "again" / "modeling_lorgnette.py").is_file()
