"""`generate`: an image is encoded once, placeholders are never emitted, and every way of decoding works."""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny import picture
from tiny_models import NUM_QUERY_TOKENS, VOCAB_SIZE, inputs, model
from tiny_training import joined, write_backbones
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from lorgnette import LorgnetteCollator, LorgnetteProcessor
from lorgnette.trainer import generation
from lorgnette.trainer.generation import generate_texts


def count_vision_passes(built, **kwargs) -> tuple[int, torch.Tensor]:
    with mock.patch.object(built.vision_model, "forward", wraps=built.vision_model.forward) as forward:
        sequences = built.generate(**kwargs)
    return forward.call_count, sequences


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "sampling", "beams", "penalties", "no cache", "static cache"],
)
def test_an_image_is_encoded_once(settings: dict):
    torch.manual_seed(0)
    built, batch = model(), inputs()
    passes, sequences = count_vision_passes(built, **batch, max_new_tokens=5, **settings)
    assert passes == 1
    repeats = settings.get("num_return_sequences", 1)
    assert torch.equal(sequences[:, :15], batch["input_ids"].repeat_interleave(repeats, dim=0))
    assert not (sequences[:, 15:] >= VOCAB_SIZE).any()


def test_cache_settings_agree_with_greedy():
    built, batch = model(), inputs()
    greedy = built.generate(**batch, max_new_tokens=6, do_sample=False)
    for settings in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(built.generate(**batch, max_new_tokens=6, do_sample=False, **settings), greedy)


@pytest.mark.parametrize(
    "image_token_id", [VOCAB_SIZE - 10, VOCAB_SIZE + 7], ids=["inside a padded table", "past its end"]
)
def test_the_placeholder_cannot_be_generated(image_token_id: int):
    """Qwen pads its table, Llama does not: the next free id lies inside the one and past the other."""
    processor = SimpleNamespace(
        image_token_id=image_token_id,
        num_query_tokens=NUM_QUERY_TOKENS,
        tokenizer=SimpleNamespace(pad_token_id=0, get_vocab=dict),
        qformer_tokenizer=None,
        stop_token_ids=[2],
    )
    built, batch = model(processor=processor), inputs(image_token_id=image_token_id)
    if image_token_id < VOCAB_SIZE:
        with torch.no_grad():  # make it by far the likeliest token
            last = built(**batch, output_hidden_states=True).hidden_states[-1][0, -1]
            built.get_output_embeddings().weight[image_token_id] = 100 * last
        assert built(**batch).logits[0, -1].argmax() == image_token_id
    for settings in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2}, {"repetition_penalty": 1.3}):
        continuation = built.generate(**batch, max_new_tokens=8, **settings)[:, 15:]
        assert not (continuation == image_token_id).any()


def test_a_repetition_penalty_sees_the_text_and_not_the_placeholders():
    built, batch = model(), inputs(rows=1)
    recorded = []

    def spy(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        recorded.append(input_ids)
        return scores

    built.generate(**batch, max_new_tokens=2, min_new_tokens=2, do_sample=False, logits_processor=[spy])
    text = set(batch["input_ids"].flatten().tolist()) - {VOCAB_SIZE}
    assert set(recorded[0].flatten().tolist()) == text


def test_several_images_and_none():
    built, one = model(), inputs(rows=1)
    image = torch.full((1, NUM_QUERY_TOKENS), VOCAB_SIZE)
    two_images = torch.cat([one["input_ids"], image, torch.full((1, 1), 9)], dim=1)
    pixels = inputs(rows=2)["pixel_values"]
    settings = {"max_new_tokens": 4, "do_sample": False}
    passes, sequences = count_vision_passes(built, input_ids=two_images, pixel_values=pixels, num_beams=2, **settings)
    assert passes == 1
    assert torch.equal(sequences[:, : two_images.shape[1]], two_images)
    text = one["input_ids"][:, :6]
    passes, sequences = count_vision_passes(built, input_ids=text, **settings)
    assert passes == 0
    with built.disable_adapter():
        plain = built.language_model.generate(text, **settings)
        assert torch.equal(built.generate(text, **settings), plain)


def test_features_in_place_of_pixels():
    built, batch = model(), inputs()
    expected = built.generate(**batch, max_new_tokens=4, do_sample=False)
    features = built.get_vision_features(batch.pop("pixel_values")).last_hidden_state
    assert torch.equal(built.generate(**batch, vision_features=features, max_new_tokens=4, do_sample=False), expected)


def test_streaming_sees_the_prompt_and_each_token():
    class Collect(BaseStreamer):
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.flatten())

        def end(self):
            self.pieces.append(None)

    built, batch, streamer = model(), inputs(rows=1), Collect()
    sequences = built.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, streamer=streamer)
    assert streamer.pieces.pop() is None
    assert torch.equal(torch.cat(streamer.pieces), sequences[0])
    assert len(streamer.pieces) == 4


def test_scores_attentions_and_hidden_states_on_request():
    built, batch = model(attn_implementation="eager"), inputs()
    built.set_attn_implementation("eager")
    outputs = built.generate(
        **batch,
        max_new_tokens=3,
        min_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert [tuple(score.shape) for score in outputs.scores] == [(2, VOCAB_SIZE)] * 3
    assert outputs.attentions[0][0].shape == (2, 4, 15, 15)
    assert outputs.hidden_states[0][-1].shape == (2, 15, 32)


def test_ways_of_decoding_that_see_token_ids_alone_are_refused():
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens: this way of decoding sees token ids alone"):
        model().generate(**inputs(), prompt_lookup_num_tokens=3)


def test_the_first_arguments_are_those_of_transformers():
    built, batch = model(), inputs()
    expected = built.generate(**batch, max_new_tokens=3, do_sample=False)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert torch.equal(built.generate(batch["input_ids"], settings, pixel_values=batch["pixel_values"]), expected)


def test_wrong_counts_are_an_error_before_the_first_token():
    built, batch = model(), inputs()
    with pytest.raises(ValueError, match="8 for 0 image"):
        built.generate(batch["input_ids"], max_new_tokens=2)
    batch["input_ids"][0, 6] = 5
    with pytest.raises(ValueError, match="Row 0 of the batch has 3"):
        built.generate(**batch, max_new_tokens=2)


@pytest.mark.parametrize("again", [False, True], ids=["pictures in the cache", "pictures given again"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_talk_goes_on_from_its_cache(again: bool, settings: dict):
    built, batch = model(), inputs(rows=1)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False} | settings
    first = built.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8, 9, 10]])], dim=1)
    expected = built.generate(longer, pixel_values=batch["pixel_values"], **settings)
    cache = copy.deepcopy(first.past_key_values)
    if "num_beams" in settings:
        cache.batch_repeat_interleave(2)
    pixels = {"pixel_values": batch["pixel_values"]} if again else {}
    assert torch.equal(built.generate(longer, past_key_values=cache, **pixels, **settings), expected)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_padding_on_the_left_changes_nothing(settings: dict):
    built, batch = model(), inputs(rows=2)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False} | settings
    alone = built.generate(batch["input_ids"][:1], pixel_values=batch["pixel_values"][:1], **settings)
    pad = torch.zeros(2, 6, dtype=torch.long)
    pad[1] = 3  # the second row has words there, the first nothing
    ids = torch.cat([pad, batch["input_ids"]], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    both = built.generate(ids, attention_mask=mask, pixel_values=batch["pixel_values"], **settings)
    assert torch.equal(both[0, 6:], alone[0])


def test_embeddings_in_place_of_token_ids():
    """The placeholders' own embedding marks where pictures go, where their id lies inside the table."""
    image_token_id = VOCAB_SIZE - 10
    processor = SimpleNamespace(
        image_token_id=image_token_id,
        num_query_tokens=NUM_QUERY_TOKENS,
        tokenizer=SimpleNamespace(pad_token_id=0, get_vocab=dict),
        qformer_tokenizer=None,
        stop_token_ids=[2],
    )
    built, batch = model(processor=processor), inputs(image_token_id=image_token_id)
    settings = {"max_new_tokens": 5, "do_sample": False, "pixel_values": batch["pixel_values"]}
    expected = built.generate(batch["input_ids"], **settings)
    embeds = built.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(built.generate(inputs_embeds=embeds, **settings), expected[:, 15:])
    assert torch.equal(built.generate(batch["input_ids"], inputs_embeds=embeds, **settings), expected)
    with pytest.raises(ValueError, match="Placeholders cannot be found in inputs_embeds"):
        model().generate(inputs_embeds=torch.zeros(2, 15, 32), pixel_values=batch["pixel_values"], max_new_tokens=1)


def test_beams_have_scores_and_attentions():
    built, batch = model(attn_implementation="eager"), inputs()
    built.set_attn_implementation("eager")
    outputs = built.generate(
        **batch,
        max_new_tokens=3,
        min_new_tokens=3,
        num_beams=2,
        num_return_sequences=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
    )
    assert outputs.sequences.shape == (4, 18)
    assert outputs.sequences_scores.shape == (4,)
    assert outputs.beam_indices.shape == (4, 3)
    assert outputs.attentions[0][0].shape == (4, 4, 15, 15)
    transitions = built.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)
    lengths = (transitions != 0).sum(dim=1)
    torch.testing.assert_close(transitions.sum(dim=1) / lengths, outputs.sequences_scores)
    with torch.no_grad():  # and they are what the model gives the same words without any cache
        logits = built(outputs.sequences, pixel_values=batch["pixel_values"].repeat_interleave(2, dim=0)).logits
    new_ids = outputs.sequences[:, 15:]
    alone = logits[:, 14:-1].log_softmax(-1).gather(2, new_ids[..., None])[..., 0].mean(dim=1)
    torch.testing.assert_close(alone, outputs.sequences_scores)


def test_prompts_of_like_length_share_a_batch_and_answers_are_in_the_rows_order(tmp_path, monkeypatch):
    built, processor = joined(write_backbones(tmp_path), dropout=0.0)
    lengths = [1, 9, 2, 8, 1, 7, 2, 9, 3]
    rows = [{"index": n, "image": picture(n), "ask": "cat " * length} for n, length in enumerate(lengths)]
    collator, decoding = LorgnetteCollator(processor, query_column="ask"), {"max_new_tokens": 4, "do_sample": False}
    alone = [
        text for row in rows for _, text in generate_texts(built, collator, [row], decoding=decoding, batch_size=1)
    ]
    monkeypatch.setattr(generation, "BATCHES_READ", 4)
    loads, load_image = [], LorgnetteProcessor.load_image
    monkeypatch.setattr(LorgnetteProcessor, "load_image", lambda *args: loads.append(1) or load_image(*args))
    asked = []
    with mock.patch.object(built, "generate", wraps=built.generate) as generate:
        found = list(generate_texts(built, collator, rows, decoding=decoding, batch_size=2))
        asked = [call.kwargs["attention_mask"] for call in generate.call_args_list]
    assert [row["index"] for row, _ in found] == list(range(9))
    assert [text for _, text in found] == alone
    assert len(set(alone)) > 1
    padding = [int((mask == 0).sum()) for mask in asked]
    words = collator.prompt_lengths(rows[:8])
    assert len(asked) == 5  # four batches of the first eight rows, and the ninth row
    assert [mask.shape[1] for mask in asked[:4]] == sorted(words, reverse=True)[::2]
    assert sum(padding) < sum(abs(a - b) for a, b in zip(words[::2], words[1::2], strict=True)) / 4
    assert len(loads) == 9
