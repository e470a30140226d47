"""`handler.py`, which goes along with every upload, as the runtime of Inference Endpoints uses it."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from strangers import WITHOUT_LORGNETTE
from tiny import picture
from tiny_serving import MAX_NEW_TOKENS, data_url, save_bridges, save_merged
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor
from lorgnette.configuration.remote_code import REQUIREMENTS
from lorgnette.processing.pipeline_lorgnette import LorgnetteImageToTextPipeline
from lorgnette.publishing.guards import check_folder
from lorgnette.serving.handler import FIELDS, EndpointHandler
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
    return made / "one"


@pytest.fixture(scope="module")
def handler(folder):
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def expected(folder):
    model = LorgnetteForConditionalGeneration.from_pretrained(folder).eval()
    pipe = LorgnetteImageToTextPipeline(model=model, processor=LorgnetteProcessor.from_pretrained(folder))
    settings = {"prompt": ASKED["prompt"], "max_new_tokens": MAX_NEW_TOKENS, "generate_kwargs": {"do_sample": False}}
    with_lora = pipe(picture(), **settings)[0]["generated_text"]
    with model.disable_adapter():
        return {True: with_lora, False: pipe(picture(), **settings)[0]["generated_text"]}


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
        ({"prompt": " "}, ValueError, "no words"),
        ({"prompt": "a" * 2**20}, ValueError, "1048576 characters"),
        ({"prompt": "a" * 999}, ValueError, r"\d+ tokens and 8 new ones are more than the 256"),
        ({"adapter": "two"}, ValueError, "no adapter 'two'; there is default"),
        ({"use_lora": 1}, ValueError, "use_lora is a int"),
        ({"max_new_tokens": True}, ValueError, "max_new_tokens is a bool"),
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
    handler = EndpointHandler(str(tmp_path))
    assert handler(ASKED)["text"] == expected[True]
    with pytest.raises(ValueError, match="saved merged: LoRA is part of the LM"):
        handler(ASKED | {"use_lora": False})


def test_it_takes_the_workers_fields():
    assert FIELDS.keys() == VisionRequest.model_fields.keys()


def test_no_object(handler):
    with pytest.raises(ValueError, match=r"an object with image_url, prompt, .* is needed, not a str"):
        handler({"inputs": "http://example.org/cat.jpg"})


def test_parameters_are_not_left_unread(handler):
    assert handler({"inputs": ASKED, "parameters": {}})["text"]
    with pytest.raises(ValueError, match="parameters are not read here"):
        handler({"inputs": ASKED, "parameters": {"max_new_tokens": 3}})


def test_what_goes_along_may_be_published(folder):
    (folder / "README.md").write_text("A model.", encoding="utf-8")
    assert {"handler.py", "requirements.txt"} <= set(check_folder(folder))
    lines = {Requirement(line).name: line for line in (folder / "requirements.txt").read_text().splitlines()}
    assert list(lines) == ["transformers", "peft", "pillow", "safetensors"]
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(lines.values()) == set(REQUIREMENTS) <= set(project["dependencies"])


def test_code_that_was_loaded_from_the_folder_writes_it_again(folder, tmp_path):
    get_class_from_dynamic_module("remote_code.save_remote_code", folder)(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"handler.py", "requirements.txt", "modeling_lorgnette.py"}
    assert all(path.read_text() == (folder / path.name).read_text() for path in tmp_path.iterdir())


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
    for name in ("handler.py", "requirements.txt"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()
