"""Workers that several test files ask in OpenAI's chat form, and the folder of the models that they serve."""

import pytest
from tiny_chat import MAX_NEW_TOKENS, said
from tiny_serving import load, save_bridges, serving

from lorgnette.serving.engine import InferenceEngine, Limits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bridges")
    save_bridges(made)
    return made


@pytest.fixture(scope="module")
def worker(folder):
    """With two adapters."""
    with serving(load(folder, max_new_tokens=MAX_NEW_TOKENS)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def single(folder):
    """With one adapter."""
    limits = Limits(max_new_tokens=MAX_NEW_TOKENS)
    with serving(InferenceEngine.load(folder / "one", {}, name="one", device="cpu", limits=limits)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def greedy(worker):
    return said(worker)
