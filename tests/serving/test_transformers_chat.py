"""`transformers chat` against the worker: what it asks for, by HTTP and by the command itself."""

import json
import os
import subprocess
import sys

import httpx2
import pytest
from tiny_chat import MAX_NEW_TOKENS, chat, said
from tiny_serving import load, metric, serving


KEY = "open sesame"


def test_transformers_generation_config(worker, greedy):
    def with_config(**config) -> dict:
        return {"generation_config": json.dumps(config | {"transformers_version": "5.24.0"})}

    many = with_config(do_sample=False, max_new_tokens=256)  # what is more than the worker's limit is no request
    assert said(worker, **many, temperature=None) == greedy
    assert chat(worker, **with_config(max_new_tokens=3)).json()["usage"]["completion_tokens"] == 3
    assert said(worker, **with_config(temperature=0.5)) == greedy  # as in transformers: without do_sample
    by_field = said(worker, temperature=0.5, top_p=0.8, seed=1)
    by_config = said(worker, **with_config(do_sample=True, temperature=0.5, top_p=0.8, top_k=None), seed=1)
    assert greedy != by_field == by_config
    assert said(worker, **with_config(do_sample=True), seed=1) == said(worker, temperature=1, seed=1)
    assert said(worker, **with_config(do_sample=True), temperature=0) == greedy


def test_transformers_chat_asks_for_the_model_first(worker, single):
    for url, asked, name in ((worker, "two", "two"), (single, "me/any", "one")):
        response = httpx2.post(f"{url}/load_model", json={"model": asked}, timeout=60)
        assert response.headers["content-type"].startswith("text/event-stream")
        event = json.loads(response.text.removeprefix("data: "))
        assert event == {"status": "ready", "model": name, "cached": True}
    assert httpx2.post(f"{worker}/load_model", json={"model": "three"}, timeout=60).status_code == 404
    assert httpx2.post(f"{worker}/load_model", json={}, timeout=60).status_code == 422


def test_the_model_is_asked_for_without_a_key(folder):
    limits = {"max_new_tokens": MAX_NEW_TOKENS, "capacity": 1, "max_body": 2000}
    with serving(load(folder, **limits), api_key=KEY) as (url, _):

        def ready(asked: str, key: str | None = None) -> httpx2.Response:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            return httpx2.post(f"{url}/load_model", json={"model": asked}, headers=headers, timeout=60)

        for key in (None, "another"):  # the same for a name that is there and one that is not
            for name in ("two", "three"):
                event = json.loads(ready(name, key).text.removeprefix("data: "))
                assert event == {"status": "ready", "model": name, "cached": True}
        assert ready("three", KEY).status_code == 404
        assert ready("two", KEY).status_code == 200
        assert ready("a" * 3000).status_code == 413
        assert httpx2.get(f"{url}/v1/models", timeout=60).status_code == 401
        assert chat(url).status_code == 401


def typed_into_chat(url: str, typed: list[str], **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "transformers.cli.transformers", "chat", "one", url, "do_sample=False"],
        input="".join(f"{line}\n" for line in typed),
        env=os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "COLUMNS": "200"} | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_transformers_chat_sends_the_key(folder):
    with serving(load(folder, max_new_tokens=MAX_NEW_TOKENS), api_key=KEY) as (url, _):
        finished = typed_into_chat(url, ["Who are you?", "n", "!exit", "!exit"], HF_TOKEN=KEY)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert "Generation stopped after reaching the token limit" in finished.stdout.split("<one>:")[1]
        refused = typed_into_chat(url, ["Who are you?", "n", "!exit", "!exit"], HF_TOKEN="another")
        assert "Generation stopped" not in refused.stdout


@pytest.mark.slow
def test_transformers_chat(single):
    """The command itself, as its user types: greedily, then sampled. It asks for 256 tokens unless told otherwise."""
    answered = 'lorgnette_requests_total{path="/v1/chat/completions",status="200"}'
    before = metric(single, answered)
    # the last two: no, do not go on; or an end and nobody to hear it
    typed = ["Who are you?", "n", "!clear", "!set do_sample=True temperature=0.5", "And I?", "!exit", "!exit"]
    finished = typed_into_chat(single, typed)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert metric(single, answered) == before + 2
    answer = said(single, messages=[{"role": "user", "content": "Who are you?"}])
    _, first, _ = finished.stdout.split("<one>:")
    assert answer[:15].isalnum()  # which Markdown leaves alone
    assert first.split()[0].startswith(answer[:15])
    assert "Generation stopped after reaching the token limit" in first
    assert "Error" not in finished.stdout + finished.stderr
