"""`generate` runs what all prompts begin with once: the same tokens, and fewer of them through the language model."""

import contextlib

import pytest
import torch
from tiny_models import NUM_QUERY_TOKENS, SCALED, TEXT, VOCAB_SIZE, inputs, language_model, model
from tiny_serving import load, save_bridges, wait_for
from tiny_training import joined, pairs, write_backbones
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteImageToTextPipeline
from lorgnette.assembly import prompt_cache
from lorgnette.assembly.prompt_cache import PromptCache, kept_prompts
from lorgnette.modeling.modeling_base import KV_CACHE
from lorgnette.serving.batching import Batcher, Request
from lorgnette.trainer import generation
from lorgnette.trainer.generation import generate_texts


SHARED, WIDTH = 8, 1 + 2 * 9 + NUM_QUERY_TOKENS
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "best beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
}


@pytest.fixture(autouse=True)
def _short_prompts_pay(monkeypatch):
    monkeypatch.setitem(prompt_cache.TOKENS_PER_PASS, "cpu", 16)


def batch_of(rows: int = 4, padded: int = 0, shared: int = SHARED) -> dict[str, torch.Tensor]:
    """Prompts that begin alike, the second of them shorter by so many tokens."""
    batch = inputs(rows=rows, text_tokens=9)
    batch["input_ids"][:, :shared] = batch["input_ids"][0, :shared].clone()
    if padded:
        batch["input_ids"][1] = torch.cat([torch.zeros(padded).long(), batch["input_ids"][1, :-padded]])
        batch["attention_mask"][1, :padded] = 0
    return batch


class Recorder(LogitsProcessor):
    """Keeps the scores of each new token, and the ids that they are for."""

    def __init__(self):
        self.scores, self.ids = [], []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.masked_fill(scores.isinf(), 0))
        self.ids.append(input_ids)
        return scores


def answers(built, batch, **settings) -> tuple[torch.Tensor, Recorder]:
    recorder = Recorder()
    torch.manual_seed(0)
    settings = {"max_new_tokens": 6, "logits_processor": LogitsProcessorList([recorder])} | settings
    return built.generate(**batch, **settings), recorder


@contextlib.contextmanager
def in_full():
    """All rows are run in full, as without the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_cache, "prefilled", lambda *_: {})
        yield


@contextlib.contextmanager
def widths(built):
    """Rows and tokens of each pass over prompts through the decoder, within the block."""
    recorded: list[tuple[int, int]] = []
    hook = built.get_decoder().register_forward_pre_hook(
        lambda _, __, given: (
            recorded.append(tuple(given["inputs_embeds"].shape[:2])) if given.get("inputs_embeds") is not None else None
        ),
        with_kwargs=True,
    )
    yield recorded
    hook.remove()


def prompt_passes(built, batch, **settings) -> list[tuple[int, int]]:
    with widths(built) as recorded:
        answers(built, batch, max_new_tokens=1, **settings)
    return [size for size in recorded if size[1] > 1]


def assert_same(found: tuple[torch.Tensor, Recorder], expected: tuple[torch.Tensor, Recorder]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1].scores, expected[1].scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [*((name, "eager") for name in (*TEXT, *SCALED)), *((name, "sdpa") for name in (*TEXT, "cohere", "granite"))],
)
@pytest.mark.parametrize("padded", [0, 3])
def test_tokens_are_those_of_rows_in_full(architecture: str, attention: str, padded: int):
    built, batch = model(text=architecture, attn_implementation=attention), batch_of(padded=padded)
    is_sliding = any(layer.is_sliding for layer in DynamicCache(config=built.language_model.config).layers)
    for settings in WAYS.values():
        with in_full(), widths(built) as plain:
            expected = answers(built, batch, **settings)
        with widths(built) as recorded:
            found = answers(built, batch, **settings)
        assert_same(found, expected)
        prompts = batch["input_ids"].repeat_interleave(len(found[0]) // 4, dim=0)
        assert torch.equal(found[0][:, :WIDTH], prompts)
        rows = plain[0][0]
        assert plain[0] == (rows, WIDTH)
        in_two = [(1, SHARED), (rows, WIDTH - SHARED)]
        assert recorded[:2] == (plain[:2] if padded and is_sliding else in_two)


def test_all_rows_may_have_padding():
    built, batch = model(), batch_of(padded=3)
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (2, 0))
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (2, 0))
    with in_full():
        expected = answers(built, batch)
    assert_same(answers(built, batch), expected)
    assert prompt_passes(built, batch) == [(1, SHARED), (4, WIDTH + 2 - SHARED)]


def test_a_sliding_window_may_be_shorter_than_what_is_shared():
    built, shared = model(text="gemma3_text"), 18
    assert built.language_model.config.sliding_window < shared
    batch = inputs(rows=3, text_tokens=20)
    batch["input_ids"][:, :shared] = batch["input_ids"][0, :shared]
    for settings in WAYS.values():
        with in_full():
            expected = answers(built, batch, **settings)
        assert_same(answers(built, batch, **settings), expected)
    assert prompt_passes(built, batch)[0] == (1, shared)


def test_several_pictures_a_row_and_rows_without_any():
    built, batch = model(), batch_of()
    batch["input_ids"][0, 14:18] = batch["input_ids"][1, 14:18] = VOCAB_SIZE  # a second one each
    batch["input_ids"][3, 10:14] = 7
    batch["pixel_values"] = torch.randn(5, 3, 32, 32)
    with in_full():
        expected = answers(built, batch)
    assert_same(answers(built, batch), expected)
    assert prompt_passes(built, batch)[0] == (1, SHARED)


def test_to_each_row_a_token_is_left():
    built, batch = model(), batch_of(rows=3, shared=10)
    batch["input_ids"][1] = torch.cat([torch.zeros(WIDTH - 10).long(), batch["input_ids"][0, :10]])
    batch["attention_mask"][1, : WIDTH - 10] = 0
    batch["pixel_values"] = batch["pixel_values"][:2]
    with in_full():
        expected = answers(built, batch)
    assert_same(answers(built, batch), expected)
    assert prompt_passes(built, batch)[0] == (1, 9)


def test_prompts_that_differ_from_the_start_are_run_in_full():
    built, batch = model(), batch_of()
    batch["input_ids"][2, 0] = 5
    assert prompt_passes(built, batch) == [(4, WIDTH)]


def test_a_pass_of_its_own_has_to_pay():
    built = model()
    assert prompt_passes(built, batch_of(rows=3)) == [(1, SHARED), (3, WIDTH - SHARED)]  # 16 tokens are saved
    assert prompt_passes(built, batch_of(rows=2)) == [(2, WIDTH)]
    assert prompt_passes(built, batch_of(rows=1)) == [(1, WIDTH)]
    assert prompt_passes(built, batch_of(rows=1), num_beams=3) == [(1, 10), (3, WIDTH - 10)]
    with kept_prompts(built):  # the second time it is worth it
        passes = [prompt_passes(built, batch_of(rows=2)) for _ in range(3)]
    assert passes == [[(2, WIDTH)], [(1, SHARED), (2, WIDTH - SHARED)], [(2, WIDTH - SHARED)]]


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"guidance_scale": 1.5},
        {"position_ids": torch.arange(WIDTH).expand(4, -1)},
        {KV_CACHE: DynamicCache()},
        {"attention_mask": None},
        {"attention_mask": torch.cat([torch.ones(4, 5), torch.zeros(4, 1), torch.ones(4, WIDTH - 6)], dim=1)},
    ],
    ids=str,
)
def test_what_generate_does_in_its_own_way_is_left_to_it(settings):
    built = model()
    settings = {name: DynamicCache() if isinstance(value, DynamicCache) else value for name, value in settings.items()}
    # guidance runs the rows again without their prompts, and offloading needs a GPU
    if not {"guidance_scale", "cache_implementation"} & set(settings):
        assert prompt_passes(built, batch_of() | settings) == [(4, WIDTH)]
    kwargs = batch_of() | {"inputs_embeds": torch.zeros(4, WIDTH, 32)} | settings
    assert prompt_cache.prefilled(built, kwargs.pop("input_ids"), kwargs, built.generation_config) == {}


def test_models_that_cannot_continue_are_run_in_full():
    batch = batch_of()
    training, checkpointing = model().train(), model()
    checkpointing.gradient_checkpointing_enable()
    scaled = model(text="llama")
    scaled.language_model.config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    for built in (training, checkpointing, scaled):
        assert prompt_passes(built, batch) == [(4, WIDTH)]


def test_the_cache_that_is_returned_fits_the_mask_of_the_caller():
    built, settings = model(), {"return_dict_in_generate": True}
    assert prompt_passes(built, batch_of(padded=3), **settings) == [(4, WIDTH)]
    with in_full():
        expected = answers(built, batch_of(), **settings)[0]
    found = answers(built, batch_of(), **settings)[0]
    assert prompt_passes(built, batch_of(), **settings) == [(1, SHARED), (4, WIDTH - SHARED)]
    for ours, theirs in zip(getattr(found, KV_CACHE).layers, getattr(expected, KV_CACHE).layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)


def test_embeddings_of_the_caller_are_run_in_full():
    built, batch = model(), batch_of()
    with torch.no_grad():
        embeds = built.get_input_embeddings()(batch["input_ids"].masked_fill(batch["input_ids"] == VOCAB_SIZE, 0))
    assert prompt_passes(built, batch | {"inputs_embeds": embeds + torch.arange(4)[:, None, None]}) == [(4, WIDTH)]


def test_processors_and_criteria_see_whole_rows():
    class Stop(StoppingCriteria):
        seen: list = []  # noqa: RUF012

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(input_ids)
            return input_ids[:, -1] % 3 == 0

    built, batch, seen = model(), batch_of(padded=3), []
    settings = {"no_repeat_ngram_size": 2, "min_new_tokens": 2, "bad_words_ids": [[7], [9]]}
    for context in (in_full(), contextlib.nullcontext()):
        Stop.seen = []
        with context:
            found = answers(built, batch, stopping_criteria=StoppingCriteriaList([Stop()]), **settings)
        seen.append((found, Stop.seen))
    assert_same(seen[1][0], seen[0][0])
    (plain, of_criteria), (found, ours) = seen
    for given, expected in ((ours, of_criteria), (found[1].ids, plain[1].ids)):
        assert len(given) == len(expected)
        assert all(map(torch.equal, given, expected))
    assert torch.equal(ours[0][:, :WIDTH], batch["input_ids"])
    assert prompt_passes(built, batch, no_repeat_ngram_size=2)[0] == (1, SHARED)


def test_a_repetition_penalty_does_not_see_padding():
    built, settings = model(), {"repetition_penalty": 1.7}
    for batch in (batch_of(), batch_of(padded=3)):
        with in_full():
            expected = answers(built, batch, **settings)
        assert_same(answers(built, batch, **settings), expected)
    assert prompt_passes(built, batch_of(), **settings) == [(1, SHARED), (4, WIDTH - SHARED)]


def test_lora_that_is_off_or_changed_is_never_mixed_up():
    built, batch = model(), batch_of()

    def expected():
        with in_full():
            return answers(built, batch)

    first = expected()
    with kept_prompts(built) as kept:
        assert_same(answers(built, batch), first)
        with built.disable_adapter():
            off = expected()
            assert_same(answers(built, batch), off)
            assert_same(answers(built, batch), off)
        assert_same(answers(built, batch), first)
        assert len(kept._entries) == 2
    assert not torch.allclose(first[1].scores[0], off[1].scores[0], atol=1e-3)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "lora_B" in name:
                weight.mul_(2)
    assert_same(answers(built, batch), expected())
    with kept_prompts(built):
        assert_same(answers(built, batch), expected())
    assert not torch.allclose(first[1].scores[0], expected()[1].scores[0], atol=1e-3)


def test_within_a_block_prompts_are_kept():
    built, batch = model(), batch_of(padded=3)
    other = {name: tensor.flip(0) for name, tensor in batch.items()}
    rest = [(4, WIDTH - SHARED)]
    with in_full():
        expected = [answers(built, given, **settings) for given in (batch, other) for settings in WAYS.values()]
    with kept_prompts(built), widths(built) as recorded:
        for given in (batch, other):
            for settings in WAYS.values():
                assert_same(answers(built, given, **settings), expected.pop(0))
        assert [size for size in recorded if size[0] == 1] == [(1, SHARED)]
        assert prompt_passes(built, batch) == rest
        assert prompt_passes(model(), batch)[0] == (1, SHARED)  # another model's are its own
    assert prompt_passes(built, batch) == [(1, SHARED), *rest]


def test_of_single_rows_a_prompt_is_kept_when_it_comes_again():
    built, batch = model(), batch_of(rows=1)
    with in_full():
        expected = answers(built, batch)
    with kept_prompts(built):
        assert prompt_passes(built, batch) == [(1, WIDTH)]
        assert prompt_passes(built, batch) == [(1, 10), (1, WIDTH - 10)]
        assert prompt_passes(built, batch) == [(1, WIDTH - 10)]
        assert_same(answers(built, batch), expected)
        short = inputs(rows=1, text_tokens=6)
        assert [prompt_passes(built, short) for _ in range(3)] == [[(1, 17)]] * 3


def caches(tokens: int = 16) -> DynamicCache:
    """4 KiB of keys and values."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 4, tokens, 8), torch.zeros(1, 4, tokens, 8), 0)
    return cache


def test_kept_bytes_are_bounded():
    made, kept = [], PromptCache(language_model(), max_bytes=10_000)

    def get(key: bytes, pays: bool = True, tokens: int = 16):
        return kept.get((key,), lambda: made.append(key) or caches(tokens), pays)

    for key in (b"a", b"b", b"a", b"c", b"a", b"b"):  # two fit: b, which was used least, goes for c, c for b
        assert get(key) is not None
        assert kept.num_bytes <= 10_000
    assert made == [b"a", b"b", b"c", b"b"]
    assert kept.num_bytes == 2 * (2 * 4 * 16 * 8 * 4)
    made.clear()
    for _ in range(3):  # what is too large is made where that pays, and does not push out the others
        assert get(b"large", tokens=64) is not None
    get(b"a"), get(b"b")
    assert made == [b"large"] * 3
    made.clear()
    assert [get(b"huge", pays=False, tokens=64) is not None for _ in range(4)] == [False, True, False, False]
    assert made == [b"huge"]
    for number in range(3_000):
        get(b"prompt %d" % number, pays=False)
    assert len(kept._entries) == prompt_cache.MAX_PROMPTS
    assert kept.num_bytes == 0


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    built, processor = joined(write_backbones(tmp_path_factory.mktemp("backbones")))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return built.eval(), processor


def test_evaluation_runs_a_data_set_s_prompt_once(parts):
    built, processor = parts
    settings = {"decoding": {"max_new_tokens": 5, "do_sample": False}, "batch_size": 5}
    with in_full():
        expected = list(generate_texts(built, LorgnetteCollator(processor), pairs(), **settings))
    with widths(built) as recorded:
        assert list(generate_texts(built, LorgnetteCollator(processor), pairs(), **settings)) == expected
    prompt = LorgnetteCollator(processor).prompts(pairs(1))["input_ids"][0].tolist()
    shared = prompt.index(processor.image_token_id)
    assert [size for size in recorded if size[1] > 1] == [
        (1, shared),
        *((rows, len(prompt) - shared) for rows in (5, 5, 2)),
    ]


def test_weights_may_change_while_texts_are_yielded(parts, monkeypatch):
    built, processor = parts
    monkeypatch.setattr(generation, "BATCHES_READ", 1)
    collator, settings = LorgnetteCollator(processor), {"decoding": {"max_new_tokens": 5}, "batch_size": 3}
    weights = [weight for name, weight in built.named_parameters() if "lora_B" in name]

    def texts() -> list[str]:
        found, before = [], [weight.detach().clone() for weight in weights]
        for number, (_, text) in enumerate(generate_texts(built, collator, pairs(6), **settings)):
            found.append(text)
            if number == 0:
                for weight in weights:
                    weight.data.mul_(-20)
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)
        return found

    with in_full():
        expected = texts()
    assert texts() == expected
    unchanged = [text for _, text in generate_texts(built, collator, pairs(6), **settings)]
    assert unchanged[:3] == expected[:3]
    assert unchanged[3:] != expected[3:]


def test_a_pipeline_runs_a_list_s_prompt_once(parts):
    built, processor = parts
    pipe = LorgnetteImageToTextPipeline(model=built, processor=processor, device="cpu")
    pictures = [row["image"] for row in pairs(5)]
    with in_full():
        expected = pipe(pictures, max_new_tokens=4)
    with widths(built) as recorded:
        assert pipe(pictures, max_new_tokens=4) == expected
        tokens = [size[1] for size in recorded if size[1] > 1]
    assert tokens == [tokens[0], tokens[1], *[tokens[0] - tokens[1]] * 4]
    with widths(built) as recorded:
        pipe(pictures, max_new_tokens=4, batch_size=5)
    assert [size for size in recorded if size[1] > 1] == [(1, tokens[1]), (5, tokens[0] - tokens[1])]


def test_a_worker_keeps_each_adapter_set_s_prompts(tmp_path):
    save_bridges(tmp_path)
    engine = load(tmp_path)
    built, processor = engine.batcher.model, engine.processors["one"]
    engine.batcher.stop()
    states = [(bridge, use_lora) for bridge in ("default", "two") for use_lora in (True, False)] * 3
    rows = [dict(processor(images=row["image"], return_tensors="pt")) for row in pairs(12)]

    def say() -> list[list[int]]:
        batcher, requests = Batcher(built, processor), []
        for (bridge, use_lora), given in zip(states, rows, strict=True):
            events = []
            requests.append(Request(given, bridge, use_lora, 6, float("inf"), events.append))
            batcher.submit(requests[-1])
            wait_for(lambda events=events: events and not isinstance(events[-1], int))
            assert isinstance(events[-1], str), events[-1]
        batcher.stop()
        return [request.tokens for request in requests]

    with in_full():
        expected = say()
    with widths(built) as recorded:
        assert say() == expected
    alone = {tuple(tokens) for tokens in expected[:4]}
    assert len(alone) > 1
    whole = rows[0]["input_ids"].shape[1]
    tokens = [size[1] for size in recorded if size[1] > 1]
    shared = tokens[4]
    assert tokens == [whole] * 4 + [shared, whole - shared] * 4 + [whole - shared] * 4


def test_a_model_without_its_head_shares_too(parts):
    built, processor = parts
    batch = LorgnetteCollator(processor).prompts(pairs(3))
    settings = {"max_new_tokens": 5, "do_sample": False}
    with in_full():
        expected = built.generate(**batch, **settings)
    with kept_prompts(built):
        assert torch.equal(built.base_model.generate(**batch, **settings), expected)
        with widths(built) as recorded:
            built.base_model.generate(**batch, **settings)
    assert all(rows == 3 for rows, _ in recorded)
    assert isinstance(built, LorgnetteForConditionalGeneration)
