"""OpenAI's chat form as its clients use it: fields that change nothing, sampling, stop strings, names of models."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import httpx2
import huggingface_hub
import numpy as np
import openai
import pytest
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from tiny import picture
from tiny_chat import MAX_NEW_TOKENS, chat, messages_about, said
from tiny_serving import blocked, data_url, load, serving, wait_for

from lorgnette import LorgnetteProcessor
from lorgnette.serving.batching import Batcher, Request
from lorgnette.serving.engine import InferenceEngine
from lorgnette.serving.payloads import ChatRequest
from lorgnette.serving.sampling import Sampler


@pytest.fixture(scope="module")
def client(worker):
    return openai.OpenAI(base_url=f"{worker}/v1", api_key="none", max_retries=0)


# ------------------------------------------------------------------------------------------------ fields

NEUTRAL = {
    "audio": None,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "generation_config": None,
    "logit_bias": {},
    "logprobs": False,
    "max_tokens": str(MAX_NEW_TOKENS),
    "metadata": {"site": "shop"},
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "reasoning_effort": "low",
    "response_format": {"type": "text"},
    "seed": 5,
    "service_tier": "auto",
    "stop": [],
    "store": False,
    "stream": "false",
    "temperature": 0,
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 0.9,
    "use_lora": "1",
    "user": "me",
}


def test_fields_that_change_nothing(worker, greedy):
    assert said(worker, **NEUTRAL) == greedy
    nulls = dict.fromkeys(NEUTRAL.keys() - {"use_lora"})
    assert said(worker, **nulls) == greedy


@pytest.mark.parametrize("name", NEUTRAL)
def test_each_field_that_changes_nothing(name):
    body = {"model": "one", "messages": messages_about(), name: NEUTRAL[name]}
    question = ChatRequest.model_validate(body).question()
    assert (question.temperature, question.stops, question.use_lora, question.stream) == (0, [], True, False)


REFUSED = {
    "audio": {"voice": "alloy"},
    "frequency_penalty": -1,
    "function_call": {"name": "look"},
    "functions": [{"name": "look"}],
    "logit_bias": {"5": 100},
    "logprobs": True,
    "max_tokens": "20 or so",
    "max_completion_tokens": "-1",
    "modalities": ["text", "audio"],
    "n": 2,
    "presence_penalty": 0.5,
    "response_format": {"type": "json_object"},
    "seed": 2**63,
    "stop": ["a", "b", "c", "d", "e"],
    "stream": "yes",
    "temperature": 2.1,
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "look"}}],
    "top_logprobs": 5,
    "top_p": 0,
    "use_lora": 2,
    "verbosity": "high",
    "web_search_options": {},
    "colour": "red",
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_would_change_the_answer(worker, name):
    response = chat(worker, **{name: REFUSED[name]})
    assert response.status_code == 422
    assert f"body.{name}" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": True}, "body.n: it is true; what is supported here is 1 or null"),
        ({"presence_penalty": False}, "body.presence_penalty: it is false; what is supported here is 0 or null"),
        ({"tools": [{}] * 3}, "body.tools: it is a list of 3; what is supported here is [] or null"),
        ({"stop": ["a", ""]}, "body.stop: stop string 1 has 0 characters; at least 1 is needed"),
        ({"stop": 5}, "body.stop: Input should be a valid list"),
        ({"temperature": float("nan")}, "body.temperature: Input should be a finite number"),
        ({"temperature": -0.1}, "body.temperature: Input should be greater than or equal to 0"),
        ({"top_p": 1.01}, "body.top_p: Input should be less than or equal to 1"),
        ({"generation_config": "{"}, "body.generation_config: it is no JSON"),
        ({"generation_config": "[" * 100_000}, "body.generation_config: it is no JSON"),
        ({"generation_config": '{"top_k": 5, "top_p": null}'}, "body.generation_config.top_k: Extra inputs"),
        (
            {"generation_config": '{"max_new_tokens": 0}'},
            "body.generation_config.max_new_tokens: Input should be greater",
        ),
        ({"max_tokens": MAX_NEW_TOKENS + 1}, "25 new tokens are requested; 24 are allowed"),
    ],
)
def test_what_is_said_of_a_field(worker, fields, message):
    response = chat(worker, **fields)
    assert response.status_code in (400, 422)
    assert message in response.json()["error"]["message"]


def test_messages_as_clients_send_them_again(worker, client):
    """A system message by its other name, and an answer with all the fields that the client's object has."""
    first = client.chat.completions.create(model="one", messages=messages_about()).choices[0].message
    history = [*messages_about(), first.model_dump(), {"role": "user", "content": "Sure?", "name": "me"}]
    answers = [
        chat(worker, messages=[{"role": role, "content": "You are two."}, *history]).json()
        for role in ("system", "developer")
    ]
    assert answers[0]["usage"] == answers[1]["usage"]
    assert answers[0]["choices"] == answers[1]["choices"]
    asked = ChatRequest(model="one", messages=[{"role": "developer", "content": "You are two."}]).question()
    assert asked.messages[0]["role"] == "system"


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
        {"refusal": "No."},
        {"function_call": {"name": "look"}},
        {"audio": {"id": "1"}},
        {"role": "tool"},
        {"mood": "good"},
    ],
)
def test_messages_that_would_change_the_answer(worker, fields):
    message = {"role": "assistant", "content": "A cat."} | fields
    response = chat(worker, messages=[*messages_about(), message])
    assert response.status_code == 422
    assert f"body.messages.1.{next(iter(fields))}" in response.json()["error"]["message"]


# ------------------------------------------------------------------------------------------------ sampling


def plain(scores: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Probabilities of tokens as papers write them, a token at a time."""
    weights = np.exp((scores - scores.max()) / temperature)
    weights /= weights.sum()
    kept, total = np.zeros_like(weights), 0.0
    for token in np.argsort(-weights):
        if total >= top_p:
            break
        kept[token] = weights[token]
        total += weights[token]
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9), (2.0, 0.5), (2.0, 1.0)])
def test_draws_follow_temperature_and_top_p(temperature, top_p):
    scores = torch.randn(30, generator=torch.Generator().manual_seed(0))
    scores[7] = -torch.inf
    sampler, count = Sampler(temperature, top_p, seed=0), 20_000
    drawn = np.bincount([sampler.draw(scores) for _ in range(count)], minlength=30) / count
    expected = plain(scores.numpy().astype(float), temperature, top_p)
    assert not drawn[expected == 0].any()
    assert (abs(drawn - expected) < 5 * np.sqrt(expected / count) + 2 / count).all()
    if top_p < 1:  # the test could tell another cut
        assert (expected == 0).sum() > 3


def test_draws_at_the_edges():
    scores = torch.tensor([1.0, 3.0, 2.0])
    assert {Sampler(1e-300, seed=0).draw(scores) for _ in range(20)} == {1}
    assert {Sampler(2.0, top_p=1e-9, seed=seed).draw(scores) for seed in range(20)} == {1}
    flat = torch.zeros(1000)
    assert len({Sampler(1.0, seed=None).draw(flat) for _ in range(20)}) > 10
    assert Sampler(1.0, seed=-1).draw(flat) == Sampler(1.0, seed=-1).draw(flat)
    with pytest.raises(RuntimeError, match="nan"):
        Sampler(1.0).draw(torch.tensor([1.0, torch.nan]))


def test_a_batch_draws_from_the_models_scores(folder):
    """400 questions at a time, half of them at each of two temperatures."""
    engine = load(folder)
    engine.batcher.stop()
    model, processor = engine.batcher.model, engine.processors["one"]
    model.set_bridge("default")
    inputs = dict(processor(images=[[picture()]], queries="What is this?", return_tensors="pt"))
    with torch.no_grad():
        scores = model(**inputs).logits[0, -1].double().numpy()
    batcher, heard, count = Batcher(model, processor, max_batch=400), [], 200
    requests = []
    for seed in range(2 * count):
        sampler = Sampler((0.3, 1.0)[seed % 2], seed=seed)
        requests.append(Request(inputs, "default", True, 1, float("inf"), heard.append, sampler))
        batcher.submit(requests[-1])
    wait_for(lambda: all(request.ended for request in requests))
    batcher.stop()
    image = processor.image_token_id
    for place, temperature in enumerate((0.3, 1.0)):
        expected = plain(np.where(np.arange(len(scores)) == image, -np.inf, scores), temperature, 1.0)
        drawn = [request.tokens[0] for request in requests[place::2] if request.tokens]
        likeliest = np.argsort(-expected)[:5]
        share = np.isin(drawn, likeliest).sum() / count
        wanted = expected[likeliest].sum()
        assert abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / count)
        assert share > 0.02


SAMPLED = [
    {"temperature": temperature, "top_p": top_p, "seed": seed}
    for temperature, top_p in ((0.7, None), (1.3, 0.9), (2.0, 0.5))
    for seed in (1, 2)
]


def test_a_seed_gives_its_answer_alone_and_in_a_batch(worker, folder, greedy):
    alone = [said(worker, **fields) for fields in SAMPLED]
    assert [said(worker, **fields) for fields in SAMPLED] == alone
    assert len({*alone, greedy}) == len(SAMPLED) + 1
    engine = load(folder, max_new_tokens=MAX_NEW_TOKENS, max_batch=16)
    asked = [{}, *SAMPLED, {"temperature": 1.0}, {"temperature": 0}, {"temperature": 1e-6}]
    with blocked(engine) as (go, began), serving(engine) as (url, _), ThreadPoolExecutor(len(asked) + 1) as pool:
        pool.submit(said, url)
        assert began.acquire(timeout=30)
        answers = [pool.submit(said, url, **fields) for fields in asked]
        wait_for(lambda: engine.batcher.waiting == len(asked))  # and so they are one batch
        go.set()
        first, *sampled, seedless, zero, cold = [answer.result() for answer in answers]
    assert sampled == alone
    assert first == zero == cold == greedy
    assert seedless not in {*alone, greedy}


def test_without_a_seed_answers_differ(worker):
    assert len({said(worker, temperature=1.0) for _ in range(4)}) == 4
    assert len({said(worker, temperature=1e-6) for _ in range(4)}) == 1


def test_top_p_is_heeded(worker, greedy):
    assert said(worker, temperature=2.0, top_p=1e-6) == greedy != said(worker, temperature=2.0)
    assert said(worker, top_p=0.9) == greedy  # without a temperature


def test_openais_client_samples(client, greedy):
    asked = {"model": "one", "messages": messages_about()}
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    answer = client.chat.completions.create(**asked, **sampled).choices[0].message.content
    assert answer != greedy
    chunks = client.chat.completions.create(**asked, **sampled, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer


# ------------------------------------------------------------------------------------------------ stop strings


def streamed(client, **fields) -> tuple[list[str], str]:
    """The pieces of an answer, and why it ended."""
    asked = {"model": "one", "messages": messages_about(), "stream": True} | fields
    *chunks, last = client.chat.completions.create(**asked)
    return [chunk.choices[0].delta.content for chunk in chunks], last.choices[0].finish_reason


def test_an_answer_ends_before_a_stop_string(client, greedy):
    asked = {"model": "one", "messages": messages_about()}
    whole = client.chat.completions.create(**asked)
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", MAX_NEW_TOKENS)
    for start, size in itertools.product(range(1, len(greedy) - 4), (1, 2, 4)):
        stop = greedy[start : start + size]
        if not stop.strip() or greedy.find(stop) != start or "\ufffd" in stop:
            continue
        for stops in (stop, ["never said", stop]):
            answer = client.chat.completions.create(**asked, stop=stops)
            assert answer.choices[0].message.content == greedy[:start].strip()
            assert answer.choices[0].finish_reason == "stop"
        pieces, why = streamed(client, stop=stop)
        assert ("".join(pieces), why) == (greedy[:start].strip(), "stop")
        # as many tokens as it takes to say the stop string, and none after it
        count = answer.usage.completion_tokens
        shorter = client.chat.completions.create(**asked, max_tokens=count - 1) if count > 1 else None
        assert shorter is None or stop not in shorter.choices[0].message.content
        longer = client.chat.completions.create(**asked, max_tokens=count)
        assert stop in longer.choices[0].message.content
        last = start
    assert last > 3  # there were some to try


def test_what_only_begins_like_a_stop_string_is_sent_in_the_end(client, greedy):
    for size in (1, 2, 3):
        stop = greedy[-size:] + "\x00"
        pieces, why = streamed(client, stop=stop)
        assert ("".join(pieces), why) == (greedy, "length")


def test_the_first_of_several_stop_strings_counts(worker, greedy):
    later, earlier = greedy[-3:], greedy[-6:-2]
    start = min(greedy.find(later), greedy.find(earlier))
    assert said(worker, stop=[later, earlier]) == greedy[:start].strip()


def test_a_sampled_answer_stops_too_and_the_others_go_on(worker, greedy):
    fields = {"temperature": 1.0, "seed": 3}
    whole = said(worker, **fields)
    stop = next(letter for letter in whole[4:] if letter.isalpha())
    with ThreadPoolExecutor(3) as pool:
        stopped, plain_one, sampled = pool.map(lambda more: said(worker, **more), [fields | {"stop": stop}, {}, fields])
    assert stopped == whole[: whole.find(stop)].strip()
    assert (plain_one, sampled) == (greedy, whole)


# ------------------------------------------------------------------------------------------------ names


def test_one_model(client, worker):
    for name in ("one", "two"):
        model = client.models.retrieve(name)
        assert model == next(listed for listed in client.models.list() if listed.id == name)
    with pytest.raises(openai.NotFoundError, match="no adapter 'me/three'; there are one, two"):
        client.models.retrieve("me/three")
    error = httpx2.get(f"{worker}/v1/models/three", timeout=60).json()["error"]
    assert (error["code"], error["type"]) == ("unknown_adapter", "invalid_request_error")


def test_a_name_with_a_slash(folder):
    with serving(InferenceEngine.load(folder / "one", {}, name="me/my eyes", device="cpu")) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert client.models.retrieve("me/my eyes").id == "me/my eyes"


def test_where_one_adapter_is_served_it_answers_to_any_name(single, greedy):
    answer = chat(single, model="gpt-4o").json()
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("one", greedy)
    assert '"model": "one"' in chat(single, model="gpt-4o", stream=True).text
    assert httpx2.get(f"{single}/v1/models/gpt-4o", timeout=60).status_code == 404


def test_where_several_are_served_a_name_is_one_of_theirs(worker):
    for fields in ({}, {"stream": True}):
        response = chat(worker, model="dummy", **fields)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_adapter")


def test_huggingface_hubs_client(single, worker, greedy, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it would ask nobody at all
    for base in (single, f"{single}/v1"):
        hub = InferenceClient(base_url=base)  # it asks for the model `dummy`
        answer = hub.chat_completion(messages_about())
        assert (answer.choices[0].message.content, answer.model) == (greedy, "one")
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "max_tokens": 20}
    said_once = hub.chat_completion(messages_about(), **sampled).choices[0].message.content
    assert said_once != greedy
    chunks = hub.chat_completion(messages_about(), **sampled, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said_once
    stop = greedy[-2:]
    stopped = hub.chat_completion(messages_about(), stop=[stop], logprobs=False, n=1, presence_penalty=0.0)
    assert stopped.choices[0].message.content == greedy[: greedy.find(stop)].strip()
    assert stopped.choices[0].finish_reason == "stop"
    assert InferenceClient(base_url=worker).chat_completion(messages_about(), model="two").model == "two"
    with pytest.raises(HfHubHTTPError, match="no adapter 'dummy'; there are one, two"):
        InferenceClient(base_url=worker).chat_completion(messages_about())


def test_a_turn_without_words(worker):
    (asked,) = messages_about()
    call = {"role": "assistant", "content": None, "refusal": None, "tool_calls": []}
    turns = [asked, call, {"role": "user", "content": "And now?"}]
    assert said(worker, messages=turns) == said(worker, messages=[asked, call | {"content": ""}, turns[2]])
    for role in ("user", "system"):
        refused = chat(worker, messages=[{"role": role, "content": None}, asked])
        assert refused.status_code == 422
        assert "content: it is null, which an assistant's alone may be" in refused.text
    assert "the text is empty" in chat(worker, messages=[call]).text


def test_a_picture_alone_is_asked_the_processors_query(worker, folder):
    (asked,) = messages_about()
    alone = asked | {"content": asked["content"][1:]}
    query = {"type": "text", "text": LorgnetteProcessor.from_pretrained(folder / "one").query}
    expected = said(worker, messages=[asked | {"content": [query, *alone["content"]]}])
    assert said(worker, messages=[alone]) == expected
    assert said(worker, messages=[{"role": "system", "content": "Be short."}, alone]) != expected


def test_what_says_nothing_is_taken_as_if_it_were_left_out(worker):
    body = {"image_url": data_url(), "prompt": "What is this?"}
    plain = httpx2.post(f"{worker}/v1/vision", json=body, timeout=60).json()
    said_nothing = {"use_lora": None, "adapter": "", "stream": None, "max_new_tokens": None}
    assert httpx2.post(f"{worker}/v1/vision", json=body | said_nothing, timeout=60).json() == plain
    assert said(worker, use_lora=None) == said(worker)
