"""The benchmark's bounds by operations, and what memory they leave, are those that are counted on the models."""

from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks import fast_paths, floor, generation, goals, memory, operations, run, sides, stage1, table, training
from benchmarks.rows import PICTURES, TEXTS, chat_prompt, processor, rows, with_texts
from benchmarks.rows import pairs as pairs_of
from benchmarks.shapes import PRESETS
from lorgnette import LorgnetteCollator
from lorgnette.assembly.prompt_cache import kept_prompts


TINY = PRESETS["tiny"]


def counted(side, of_side):
    return floor.operations(training.step_of(side, of_side, "cpu", False))


@pytest.mark.parametrize("texts", [1, 5])
def test_operations_by_shapes_are_those_that_are_counted(texts):
    of_ours = rows(3, seed=0) if texts == 1 else with_texts(rows(2, seed=0), texts, seed=0)
    theirs, ours = sides.build(TINY, seed=0)
    chat = LorgnetteCollator(processor(TINY, chat=True))
    chat_sides = {"theirs": sides.Side(theirs.model, sides.RowByRow(chat)), "uncached": sides.Side(ours.model, chat)}
    for name, found, built in (
        ("stage 2", operations.stage2(TINY, of_ours), {"theirs": theirs, "uncached": ours}),
        ("stage 2, chat", operations.stage2(TINY, of_ours, chat=True), chat_sides),
        ("stage 1", operations.stage1(TINY, of_ours), stage1.build(TINY, seed=0)),
    ):
        assert found.keys() >= built.keys()
        for way, side in built.items():
            measured = counted(side, of_ours if way in ("ours", "uncached") else pairs_of(of_ours))
            assert sum(found[way].values()) == pytest.approx(measured, rel=0.03), (name, way)


def test_operations_of_packed_and_cached_batches_are_those_that_are_counted():
    theirs, ours = sides.build(TINY, seed=0)
    for case in fast_paths.cases(TINY, theirs, ours, rows(4, seed=0), seed=0):
        for name, side in (("theirs", case.theirs), ("ours", case.ours), ("plain", case.plain)):
            found = operations.stage2_of(TINY, side.collator(case.rows), all_logits=name == "theirs")
            assert sum(found.values()) == pytest.approx(counted(side, case.rows), rel=0.03), (case.name, name)
    batch = ours.collator(rows(2, seed=0))
    batch["vision_features"] = batch.pop("pixel_values")
    assert operations.stage2_of(TINY, batch)["ViT"] == 0


def test_operations_of_captions_are_those_that_are_counted():
    theirs, ours = sides.build(TINY, seed=0)
    theirs.model.requires_grad_(False)  # the counter follows gradients, which `generate` has none of
    chat = LorgnetteCollator(processor(TINY, chat=True))
    prompt, shared = chat_prompt(TINY)
    for collator, of_prompt in ((ours.collator, TINY.num_query_tokens + 1), (chat, prompt)):
        inputs = generation.inputs_of(collator, rows(3, seed=0), ours.model.device)["theirs"]
        assert inputs["input_ids"].shape[1] == of_prompt
        for tokens in (1, 4):
            found = operations.captions(TINY, 3, of_prompt, tokens)["theirs"]
            measured = floor.operations(partial(generation.caption, theirs.model.eval(), inputs, tokens))
            assert sum(found.values()) == pytest.approx(measured, rel=0.03), (of_prompt, tokens)
    parts = operations.captions(TINY, 3, prompt, 1, shared)
    own, whole = (parts[name]["LM, prompt"] for name in ("ours", "theirs"))
    assert own == pytest.approx(whole * (prompt - shared) / prompt)


def test_operations_of_our_captions_are_those_that_are_counted():
    _, ours = sides.build(TINY, seed=0)
    chat = LorgnetteCollator(processor(TINY, chat=True))
    sizes = {"BLIP-2's": (TINY.num_query_tokens + 1, 0), "chat": chat_prompt(TINY)}
    with kept_prompts(ours.model):
        for collator, (name, (prompt, shared)) in zip((ours.collator, chat), sizes.items(), strict=True):
            inputs = generation.inputs_of(collator, rows(3, seed=0), ours.model.device)["ours"]
            generation.caption(ours.model.eval(), inputs, 1)  # what it begins with is kept
            found = operations.captions(TINY, 3, prompt, 1, shared)["ours"]
            measured = floor.operations(partial(generation.caption, ours.model.eval(), inputs, 1))
            assert sum(found.values()) == pytest.approx(measured, rel=0.03), name


def test_a_goal_may_be_a_share_of_the_bound(monkeypatch):
    monkeypatch.setattr(run, "write_raw", lambda _: None)
    bench = SimpleNamespace(goals={}, shares={"a": 0.9}, table=[], raw={})
    run.Bench.add(bench, table.speed("a", 8, ours=[1.0], theirs=[1.7], bound=2.0))
    assert bench.table[0].goal == pytest.approx(1.8)
    assert bench.table[0].met is False


def test_stage_1_leaves_operations_out_at_the_shapes_that_are_timed():
    """At tiny ones keys and values are less than what fills up the tokens that ITG predicts."""
    one, several = (operations.stage1(PRESETS["smollm2"], found) for found in
                    (rows(8, seed=0), with_texts(rows(2, seed=0), 5, seed=0)))  # fmt: skip
    assert 1 < operations.bound(one, "ours", "plain") < operations.bound(one, "ours", "separate")
    for way in ("plain", "separate"):
        assert operations.bound(several, "ours", way) > 1.5 * operations.bound(one, "ours", way)


def test_the_goals_of_five_captions_are_within_their_bounds():
    several = with_texts(rows(PICTURES, seed=0), TEXTS, seed=0)
    for name, chat in (("5 captions a picture", False), ("5 captions a picture, chat prompts", True)):
        parts = operations.stage2(PRESETS["smollm2"], several, chat)
        for way in ("uncached", "cached"):
            goal = goals.GOALS["smollm2", "cpu"][f"stage 2, {name}, {way}, pairs/s"]
            assert goal < operations.bound(parts, way) < 1.4 * goal


def test_operations_are_told_by_part(capsys):
    assert operations.main(["--preset", "tiny", "--batch_size", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| theirs over this | 1.00 | ") == 4  # stage 2 in three ways, captions
    assert printed.count("| separate over this | 1.00 | ") == 2
    assert "stage 2, 10 pairs, 5 texts a picture, chat prompts\n" in printed
    assert "| LM's head | " in printed


def test_what_is_kept_is_told_by_part(capsys):
    theirs, ours = (memory.kept(side, rows(3, seed=0)) for side in sides.build(TINY, seed=0))
    assert theirs["ViT"] == ours["ViT"] == 0
    layers = ours["LM's layers"]
    assert theirs["LM's layers"] == layers > 0
    head = "LM's head, and between the parts"
    assert ours[head] < theirs[head]
    of_layers = sum(size for part, size in ours.items() if part != head)
    assert memory.least(sides.build(TINY, seed=0)[1], rows(3, seed=0), "cpu", False) == of_layers
    assert memory.main(["--preset", "tiny", "--batch_size", "3"]) == 0
    printed = capsys.readouterr().out
    assert f"| LM's layers | {layers / 2**20:.1f} | " in printed
    assert "| MiB saved for backward, 10 pairs, 5 texts a picture | theirs | ours |" in printed
