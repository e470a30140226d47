"""The worker: what sites get for what they send, by HTTP on the loopback device."""

import http.client
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from tiny import picture
from tiny_serving import (
    MAX_NEW_TOKENS,
    blocked,
    data_url,
    load,
    metric,
    picture_host,
    save_merged,
    serving,
    wait_for,
)

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor
from lorgnette.processing.pipeline_lorgnette import LorgnetteImageToTextPipeline
from lorgnette.serving.engine import InferenceEngine, Limits
from lorgnette.serving.stops import cut, sendable


PROMPT = "What is this?"


@pytest.fixture(scope="module")
def worker(folder):
    with serving(load(folder)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def host():
    with picture_host() as url:
        yield url


@pytest.fixture(scope="module")
def expected(folder):
    """(bridge, LoRA, seed of the picture, prompt) -> what the pipeline says, which knows of no bridges and batches."""
    pipes = {}
    for name in ("one", "two"):
        model = LorgnetteForConditionalGeneration.from_pretrained(folder / name).eval()
        processor = LorgnetteProcessor.from_pretrained(folder / name)
        pipes[name] = LorgnetteImageToTextPipeline(model=model, processor=processor)

    def say(adapter: str, use_lora: bool = True, seed: int = 0, prompt: str = PROMPT) -> str:
        pipe = pipes[adapter]
        (pipe.model.enable_adapters if use_lora else pipe.model.disable_adapters)()
        settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
        return pipe(picture(seed), prompt=prompt, generate_kwargs=settings)[0]["generated_text"]

    return say


def ask(worker: str, **fields) -> httpx2.Response:
    body = {"image_url": data_url(), "prompt": PROMPT} | fields
    return httpx2.post(f"{worker}/v1/vision", json=body, timeout=60)


def test_bridges_and_lora_answer_as_the_models_that_they_are(worker, host, expected):
    recorded = set()
    for adapter in ("one", "two"):
        for use_lora in (True, False):
            for url in (data_url(3), f"{host}/picture/3"):
                answer = ask(worker, image_url=url, adapter=adapter, use_lora=use_lora).json()
                assert answer["text"] == expected(adapter, use_lora, seed=3)
                assert answer["adapter"] == adapter
                usage = answer["usage"]
                assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 20
            recorded.add(answer["text"])
    assert len(recorded) == 4
    assert ask(worker, image_url=data_url(3)).json()["text"] == expected("one", seed=3)


def test_what_wp_remote_post_sends(worker, host, expected):
    """To the letter as WordPress 6 sends it: PHP's json_encode escapes slashes, and the connection is closed."""
    url = f"{host}/picture/4".replace("/", "\\/")
    body = f'{{"image_url":"{url}","prompt":"{PROMPT}","adapter":"two","use_lora":true}}'.encode()
    where = urlsplit(worker)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=30)
    connection.putrequest("POST", "/v1/vision", skip_accept_encoding=True)
    headers = {
        "User-Agent": "WordPress/6.8.3; https://shop.example",
        "Accept": "*/*",
        "Accept-Encoding": "deflate, gzip, br",
        "Content-Type": "application/json",
        "Connection": "close",
        "Content-Length": str(len(body)),
    }
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    assert (response.status, response.headers.get_content_type()) == (200, "application/json")
    answer = json.loads(response.read())
    assert answer["text"] == expected("two", seed=4)
    assert answer["usage"]["completion_tokens"] <= MAX_NEW_TOKENS


@pytest.mark.parametrize(
    ("use_lora", "means"), [("1", True), ("True", True), (1, True), ("0", False), ("FALSE", False), (0, False)]
)
def test_values_as_php_sends_them(worker, expected, use_lora, means):
    """What comes out of a form is text, and PHP's (int) true is 1."""
    assert ask(worker, use_lora=use_lora).json()["text"] == expected("one", means)
    answer = ask(worker, use_lora=use_lora, max_new_tokens="2", stream="0").json()
    assert answer["usage"]["completion_tokens"] == 2
    assert ask(worker, stream="1").text.endswith("data: [DONE]\n\n")


def test_a_stream_of_pieces(worker, expected):
    whole = ask(worker, adapter="two").json()
    response = ask(worker, adapter="two", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    *pieces, last = map(json.loads, events)
    assert "".join(piece["delta"] for piece in pieces) == last["text"] == expected("two")
    assert last == whole


def test_openais_client(worker, host, expected):
    client = openai.OpenAI(base_url=f"{worker}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["one", "two"]
    image = {"type": "image_url", "image_url": {"url": f"{host}/picture/5"}}
    messages = [{"role": "system", "content": "You are two."}]
    messages += [{"role": "user", "content": [{"type": "text", "text": PROMPT}, image]}]
    asked = {"model": "two", "messages": messages, "temperature": 0}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected("two", seed=5)
    assert answer.choices[0].finish_reason == ("length" if answer.usage.completion_tokens == MAX_NEW_TOKENS else "stop")
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected("two", seed=5)
    assert last.usage == answer.usage
    plain = client.chat.completions.create(**asked, extra_body={"use_lora": False}, max_tokens=2)
    assert plain.usage.completion_tokens <= 2
    with pytest.raises(openai.NotFoundError, match="no adapter 'three'; there are one, two"):
        client.chat.completions.create(**asked | {"model": "three"})


def test_a_chat_without_a_picture(worker):
    messages = [{"role": "user", "content": "Who are you?"}]
    response = httpx2.post(f"{worker}/v1/chat/completions", json={"model": "one", "messages": messages}, timeout=60)
    assert response.status_code == 200
    assert isinstance(response.json()["choices"][0]["message"]["content"], str)


BAD = {
    "no host": ({"image_url": "http://127.0.0.1:9/a.png"}, 502, "image_unreachable", "cannot fetch http://127.0.0.1:9"),
    "no such picture": ({"image_url": "HOST/gone"}, 502, "image_unreachable", "404"),
    "no picture": ({"image_url": "HOST/page"}, 422, "no_picture", "is no picture that is read here"),
    "loopback": ({"image_url": "http://localhost:80/a.png"}, 400, "image_refused", "not on the public internet"),
    "mapped": ({"image_url": "http://[::ffff:127.0.0.1]/"}, 400, "image_refused", "not on the public internet"),
    "decimal": ({"image_url": "http://2130706433/"}, 400, "image_refused", "not on the public internet"),
    "metadata": ({"image_url": "http://169.254.169.254/"}, 400, "image_refused", "not on the public internet"),
    "redirect": ({"image_url": "HOST/to?http://localhost/a"}, 400, "image_refused", "localhost is not on the public"),
    "redirect to a file": ({"image_url": "HOST/to?file:///etc/passwd"}, 502, "image_unreachable", "is not allowed"),
    "a file": ({"image_url": "/etc/passwd"}, 422, "no_picture", "begins with http://, https:// or data:"),
    "no base64": ({"image_url": "data:image/png;base64,!!!"}, 422, "no_picture", "not valid base64"),
    "100 MP": ({"image_url": "HOST/huge"}, 422, "no_picture", "10000 x 10000 pixels are more than the 50000000"),
    "adapter": ({"adapter": "three"}, 404, "unknown_adapter", "no adapter 'three'; there are one, two"),
    "empty prompt": ({"prompt": " "}, 422, "invalid_request", "body.prompt: the text is empty"),
    "1 MB of prompt": ({"prompt": "a" * 2**20}, 422, "invalid_request", "1048576 characters are more than the 50000"),
    "long prompt": ({"prompt": "a" * 999}, 400, "prompt_too_long", "with 8 new ones that is more than the 256"),
    "half a character": ({"prompt": "\ud800"}, 400, "unusable_prompt", "U+D800, a lone surrogate"),
    "a URL that is none": ({"image_url": "http://[zz]/"}, 422, "no_picture", "http://[zz]/ is no URL"),
    "half a character in a URL": ({"image_url": "http://a\ud800/"}, 502, "image_unreachable", "http://a\\ud800/"),
    "a number as prompt": ({"prompt": 5}, 422, "invalid_request", "body.prompt: Input should be a valid string"),
    "text as boolean": ({"use_lora": "no"}, 422, "invalid_request", "body.use_lora: Input should be a valid boolean"),
    "2 as boolean": ({"use_lora": 2}, 422, "invalid_request", "body.use_lora: Input should be a valid boolean"),
    "text as number": (
        {"max_new_tokens": "8x"},
        422,
        "invalid_request",
        "body.max_new_tokens: Input should be a valid",
    ),
    "a fraction": ({"max_new_tokens": "2.0"}, 422, "invalid_request", "body.max_new_tokens: Input should be a valid"),
    "a sign": ({"max_new_tokens": "-1"}, 422, "invalid_request", "body.max_new_tokens: Input should be a valid"),
    "0 as text": ({"max_new_tokens": "0"}, 422, "invalid_request", "greater than or equal to 1"),
    "a list as URL": ({"image_url": []}, 422, "invalid_request", "body.image_url: Input should be a valid string"),
    "no URL": ({"image_url": None}, 422, "invalid_request", "body.image_url: Input should be a valid string"),
    "a long URL": ({"image_url": "http://a/" + "b" * 9000}, 422, "invalid_request", "9009 characters are more"),
    "another field": ({"temperature": 1}, 422, "invalid_request", "body.temperature: Extra inputs"),
    "too many tokens": ({"max_new_tokens": 9}, 400, "too_many_tokens", "9 new tokens are requested; 8 are allowed"),
    "no tokens": ({"max_new_tokens": 0}, 422, "invalid_request", "greater than or equal to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(worker, host, case):
    fields, status, code, message = BAD[case]
    body = {"image_url": data_url(), "prompt": PROMPT} | fields
    if isinstance(body["image_url"], str):
        body["image_url"] = body["image_url"].replace("HOST", host)
    response = httpx2.post(f"{worker}/v1/vision", content=json.dumps(body), headers=JSON, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert message in error["message"]
    assert "Traceback" not in response.text
    assert len(response.text) < 3000


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "What?"}', "body.image_url: Field required"),
        (b'{"image_url": "http://example.org/a.png"}', "body.prompt: Field required"),
        (b"{", "JSON decode error"),
        (b"", "body: Field required"),
        (b"[]", "body: Input should be"),
        (b"\xff\xfe", "body"),
    ],
)
def test_bodies_that_are_no_request(worker, body, message):
    response = httpx2.post(f"{worker}/v1/vision", content=body, headers=JSON, timeout=60)
    assert response.status_code in (400, 422)
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain; charset=utf-8"])
def test_a_body_that_is_not_called_json(worker, kind):
    """WordPress calls it a form, unless it is told."""
    body = json.dumps({"image_url": data_url(), "prompt": PROMPT})
    response = httpx2.post(f"{worker}/v1/vision", content=body, headers=kind and {"Content-Type": kind}, timeout=60)
    assert response.status_code == 422
    message = f"the body's Content-Type is {kind or 'not given'}; application/json is needed"
    assert response.json()["error"]["message"] == message


def test_other_paths_and_methods(worker):
    assert httpx2.get(f"{worker}/v1/vision", timeout=60).json()["error"]["message"] == "Method Not Allowed"
    assert httpx2.post(f"{worker}/elsewhere", timeout=60).json()["error"]["message"] == "Not Found"
    assert httpx2.get(f"{worker}/healthz", timeout=60).json() == {"status": "ok"}
    assert httpx2.head(f"{worker}/healthz", timeout=60).status_code == 200
    assert httpx2.get(f"{worker}/health", timeout=60).json() == {"status": "ok"}


def test_a_batch_answers_as_each_alone(worker, expected):
    """Prompts of different lengths, both bridges, LoRA on and off, all at once."""
    before = {bridge: metric(worker, f'lorgnette_batch_rows_count{{adapter="{bridge}"') for bridge in ("one", "two")}
    cases = [
        {"adapter": adapter, "use_lora": use_lora, "seed": seed, "prompt": PROMPT + " And that?" * (seed % 3)}
        for adapter in ("one", "two")
        for use_lora in (True, False)
        for seed in range(6)
    ]
    with ThreadPoolExecutor(len(cases)) as pool:
        fields = [
            {n: v for n, v in case.items() if n != "seed"} | {"image_url": data_url(case["seed"])} for case in cases
        ]
        answers = list(pool.map(lambda one: ask(worker, **one).json(), fields))
    assert [answer["text"] for answer in answers] == [expected(**case) for case in cases]
    batches = sum(metric(worker, f'lorgnette_batch_rows_count{{adapter="{name}"') - before[name] for name in before)
    assert batches < len(cases)


def test_lora_that_was_merged_cannot_be_left_out(folder, expected, tmp_path):
    save_merged(folder / "one", tmp_path)
    with serving(InferenceEngine.load(tmp_path, {}, device="cpu", limits=Limits(max_new_tokens=MAX_NEW_TOKENS))) as (
        url,
        _,
    ):
        assert ask(url).json()["text"] == expected("one")
        response = ask(url, use_lora=False)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "lora_merged")


def test_keys(folder):
    with serving(load(folder), api_key="open sesame") as (url, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic open sesame"}):
            response = httpx2.post(f"{url}/v1/vision", json={}, headers=headers, timeout=60)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")
            assert httpx2.get(f"{url}/metrics", headers=headers, timeout=60).status_code == 401
        for path in ("healthz", "health"):
            assert httpx2.get(f"{url}/{path}", timeout=60).status_code == 200
        allowed = {"Authorization": "Bearer open sesame"}
        assert httpx2.post(f"{url}/v1/vision", json={}, headers=allowed, timeout=60).status_code == 422


def test_large_bodies(folder):
    with serving(load(folder, max_body=10_000)) as (url, _):
        response = ask(url, image_url="data:image/png;base64," + "A" * 20_000)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")

        def chunks():  # without a length in front
            for _ in range(20):
                yield b" " * 1000

        response = httpx2.post(f"{url}/v1/vision", content=chunks(), headers=JSON, timeout=60)
        assert response.status_code == 413
        assert "larger than 10000 bytes" in response.json()["error"]["message"]


def test_slow_hosts_and_slow_callers(folder, host):
    with serving(load(folder, timeout=3.0, fetch_timeout=0.5)) as (url, _):
        start = time.monotonic()
        response = ask(url, image_url=f"{host}/slow")
        assert (response.status_code, response.json()["error"]["code"]) == (504, "image_timeout")
        assert "not complete after 0.5 s" in response.json()["error"]["message"]
        where = urlsplit(url)
        caller = http.client.HTTPConnection(where.hostname, where.port, timeout=30)
        caller.request("POST", "/v1/vision", headers=JSON | {"Content-Length": "1000"})  # and never sends them
        response = caller.getresponse()
        assert response.status == 408
        assert b"had not arrived after 3 s" in response.read()
        caller.close()
        assert time.monotonic() - start < 20


@pytest.fixture
def blocked_engine(folder):
    engine = load(folder, timeout=20.0, capacity=4, max_batch=1)
    with blocked(engine) as (go, began):
        yield engine, go, began


def test_a_full_house_and_callers_that_hang_up(blocked_engine):
    engine, go, began = blocked_engine
    with serving(engine) as (url, _), ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, url)
        assert began.acquire(timeout=30)
        where = urlsplit(url)
        body = json.dumps({"image_url": data_url(), "prompt": PROMPT})
        callers = [http.client.HTTPConnection(where.hostname, where.port, timeout=30) for _ in range(3)]
        for caller in callers:
            caller.request("POST", "/v1/vision", body, JSON)
        wait_for(lambda: engine.batcher.waiting == 3)
        refused = ask(url)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["message"] == "4 requests are in progress, which is the limit"
        for caller in callers:
            caller.close()
        wait_for(lambda: metric(url, 'lorgnette_requests_total{path="/v1/vision",status="499"}') == 3)
        go.set()
        assert first.result().status_code == 200
        assert ask(url).status_code == 200
        assert metric(url, "lorgnette_batch_rows_count") == 2  # those that hung up were never answered
        assert metric(url, "lorgnette_inside") == 0


def test_a_stream_that_nobody_reads_any_more_ends(blocked_engine):
    engine, go, began = blocked_engine
    with serving(engine) as (url, _):
        where = urlsplit(url)
        caller = http.client.HTTPConnection(where.hostname, where.port, timeout=30)
        caller.request(
            "POST", "/v1/vision", json.dumps({"image_url": data_url(), "prompt": PROMPT, "stream": True}), JSON
        )
        assert began.acquire(timeout=30)
        caller.getresponse().close()
        caller.close()
        wait_for(lambda: metric(url, "lorgnette_inside") == 0)
        go.set()
        assert ask(url).status_code == 200
        assert metric(url, "lorgnette_generated_tokens_total") <= MAX_NEW_TOKENS  # of the second alone


def test_a_model_that_takes_too_long_or_fails(blocked_engine):
    engine, go, _ = blocked_engine
    engine.limits.timeout = 1.0
    with serving(engine) as (url, _):
        response = ask(url)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        assert response.json()["error"]["message"] == "not answered within 1 s"
        go.set()

        def fail(**_):
            raise RuntimeError("out of luck")

        working, engine.batcher.model.generate = engine.batcher.model.generate, fail
        response = ask(url)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "model_error")
        assert "RuntimeError: out of luck" in response.json()["error"]["message"]
        engine.batcher.model.generate = working
        assert ask(url).status_code == 200  # the thread lives on


def test_stopping_finishes_what_is_under_way(blocked_engine):
    engine, go, began = blocked_engine
    with serving(engine) as (url, server), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, url)
        assert began.acquire(timeout=30)
        server.should_exit = True
        time.sleep(0.5)
        go.set()
        assert first.result().status_code == 200
    with pytest.raises(httpx2.ConnectError):
        ask(url)
    assert not engine.batcher.is_alive


def test_a_thousand_at_once(folder):
    """Each is answered, or told to come again; nobody waits for ever."""
    import asyncio

    from lorgnette.serving.worker import build_app

    engine = load(folder, capacity=16)

    async def flood() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(build_app(engine))
        async with httpx2.AsyncClient(transport=transport, base_url="http://worker", timeout=60) as client:
            body = {"image_url": data_url(), "prompt": PROMPT, "max_new_tokens": 2}
            return await asyncio.gather(*(client.post("/v1/vision", json=body) for _ in range(1000)))

    responses = asyncio.run(flood())
    engine.batcher.stop()
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 16
    assert all(response.headers["retry-after"] == "1" for response in responses if response.status_code == 503)
    assert len({response.json()["text"] for response in responses if response.status_code == 200}) == 1


def test_stop_strings_in_all_short_texts():
    """What is sent piece by piece is what [`cut`] leaves in the end, and never more."""
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=5)]
    for stops in ([], ["ab"], ["aab", "b"], ["abab"], ["ba", "bba", "aaa"]):
        for text in texts:
            whole = cut(text, stops)
            assert text.startswith(whole)
            assert not any(stop in whole for stop in stops)
            assert (whole == text) == (not any(stop in text for stop in stops))
            sent = ""
            for end in range(1, len(text) + 1):
                now = sendable(text[:end], stops)
                assert now.startswith(sent)
                assert whole.startswith(now)
                assert not any(now.endswith(stop[:1]) and text[:end] == now for stop in stops if len(stop) > 1)
                sent = now
    assert sendable("abc", ["xyz"]) == "abc"  # nothing is held back without need
    assert sendable("abx", ["xyz"]) == "ab"
