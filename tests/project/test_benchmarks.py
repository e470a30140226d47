"""The benchmarks run, and their figures are what they say."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import datasets
import pytest
import tiny
import tiny_models
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from tiny_training import joined, pairs, write_backbones
from torch._inductor import config as inductor
from transformers import CompileConfig

from benchmarks import (
    cache,
    compiled,
    fast_paths,
    files,
    floor,
    forms,
    generation,
    goals,
    growth,
    memory,
    run,
    several_texts,
    sides,
    stage1,
    table,
    training,
)
from benchmarks.rows import captions, rows, with_texts
from benchmarks.rows import pairs as pairs_of
from benchmarks.shapes import PRESETS


@pytest.mark.parametrize(("long", "least", "rounds"), [(0.0, 2, 2), (0.0, 3, 3), (60.0, 2, 4)])
def test_two_rounds_are_enough_of_what_takes_long(monkeypatch, long, least, rounds):
    monkeypatch.setattr(training, "LONG", long)
    order: list[str] = []
    runs = {name: lambda number, name=name: order.append(name) or [float(number)] for name in ("theirs", "ours")}
    assert training.in_turn(runs, 4, least) == {name: [float(number) for number in range(rounds)] for name in runs}
    assert order[:4] == ["theirs", "ours", "ours", "theirs"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_an_epoch_on_the_cache_is_timed_and_has_the_losses_of_the_pictures(tmp_path, capsys):
    _, text = write_backbones(tmp_path)
    for part in (tiny_models.vision_model("dinov2"), tiny.image_processor()):  # which takes pictures of any size
        part.save_pretrained(tmp_path / "dinov2")
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    rows = [{name: row[name] for name in ("image", "text")} for row in pairs(6)]
    DatasetDict(train=Dataset.from_list(rows, Features(image=Image(), text=Value("string")))).save_to_disk(
        tmp_path / "rows"
    )
    options = f"--vision {tmp_path}/dinov2 --text {text} --qformer {tmp_path}/bert --dataset {tmp_path}/rows --rows 4"
    options += f" --batch_size 4 --repeats 1 --image_size 48 --stages stage2 --output {tmp_path}/report.json"
    assert cache.main(options.split()) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    patches = (48 // tiny_models.PATCH_SIZE) ** 2
    assert report["caches"]["float16"]["bytes_per_image"] == (patches + 1) * 24 * 2
    assert report["stages"]["stage2"]["losses_apart"]["float32"] <= cache.TOLERANCE["float32"]
    assert len(report["stages"]["stage2"]["losses"]) == 1
    assert "stage2: " in capsys.readouterr().out


def test_the_forms_are_weighed_and_loaded_and_give_the_same_logits(tmp_path, capsys):
    vision, text = write_backbones(tmp_path)
    model, processor = joined((vision, text))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    options = f"--model {tmp_path}/model --vision {vision} --text {text} --repeats 1 --output {tmp_path}/report.json"
    assert forms.main(options.split()) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())["forms"]
    assert report["thin"]["bytes"] < report["merged"]["bytes"] <= report["full"]["bytes"]
    assert all(len(found["seconds"]) == 1 for found in report.values())
    assert "| `thin` | " in capsys.readouterr().out


TINY = PRESETS["tiny"]
SEVERAL = ("5 captions a picture", "5 captions a picture, chat prompts")


def test_the_table_has_every_row_and_the_files_lie_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "import_seconds", lambda rounds: {"theirs": [2.0] * rounds, "ours": [1.0] * rounds})
    options = "--preset tiny --batch_size 3 --steps 1 --rounds 2 --caption_rounds 3 --sizes 1 2 --tokens 2"
    assert run.main([*options.split(), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "tiny-cpu.json").read_text())
    found = {row["path"]: row for row in report["rows"]}
    sized = {
        f"{what}, batch {size}{unit}" for what, unit in (("captions/s", ""), ("first token", ", s")) for size in (1, 2)
    } | {"first token, chat prompts, batch 2, s"}
    forms_of = {f"from_pretrained to first caption, {form}, ms" for form in ("thin", "full", "merged")}
    of_stage2 = {
        f"stage 2, {kind}, {what}" for kind in ("uncached", "cached") for what in ("pairs/s", "memory of a step, MiB")
    }
    left_out = {
        "chat prompts": "against ours with the beginning run in each row",
        "mixed lengths, packed": "against ours padded",
    }
    of_stage2 |= {f"stage 2, {name}, {kind}, pairs/s" for name in left_out for kind in ("uncached", "cached")}
    of_stage2 |= {f"stage 2, {name}, cached, {against}, pairs/s" for name, against in left_out.items()}
    several = {f"stage 2, {name}, {kind}, pairs/s" for name in SEVERAL for kind in ("uncached", "cached")}
    several |= {f"stage 1, 5 captions a picture, against {way}, pairs/s" for way in ("plain", "separate")}
    several |= {"stage 2, 5 captions a picture, uncached, memory of a step, MiB"}
    others = {"stage 2, uncached, MFU", "data loader, pairs/s", "checkpoint weights, MB", "import, s"}
    others |= {f"stage 1 against {way}, pairs/s" for way in ("plain", "separate")}
    assert found.keys() == sized | forms_of | of_stage2 | several | others
    wanted = {path for wanted in (goals.GOALS, goals.SHARES) for paths in wanted.values() for path in paths}
    assert {path for path in wanted if "batch 8" not in path and "batch 64" not in path} <= found.keys()
    assert all(row["ours"] > 0 for row in found.values())
    assert len(found["stage 2, cached, pairs/s"]["ratios"]) == 2
    operations = report["raw"]["stage 2, cached, pairs/s"]["operations_a_step"]
    assert operations["cached"] < operations["uncached"] < operations["theirs"]  # no ViT; no logits of all positions
    uncountable = forms_of | {"stage 2, uncached, MFU", "data loader, pairs/s", "checkpoint weights, MB", "import, s"}
    assert {path for path, row in found.items() if row["bound"] is None} == uncountable
    assert {found[path]["bound"] for path in sized - {"first token, chat prompts, batch 2, s"}} == {1}
    assert found["first token, chat prompts, batch 2, s"]["bound"] < 1  # of seconds
    for path in several:
        fewer = "memory" in path
        assert (found[path]["bound"] < 1) == fewer, path
        assert found[path]["share"] == pytest.approx((found[path]["ratio"] / found[path]["bound"]) ** (1 - 2 * fewer))
    assert len(found["captions/s, batch 2"]["ratios"]) == 3
    for name in SEVERAL:
        assert max(report["raw"][f"{name}_apart"].values()) <= sides.TOLERANCE
    needed = report["raw"]["stage 2, 5 captions a picture, uncached, memory of a step, MiB"]["bytes"]
    assert needed["least"] < needed["uncached"] < needed["theirs"]
    for name in left_out:
        operations = report["raw"][f"stage 2, {name}, cached, pairs/s"]["operations_a_step"]
        assert operations["cached"] < operations["plain"] < operations["theirs"]
        assert operations["cached"] < operations["uncached"] < operations["theirs"]
        assert max(report["raw"][f"{name}_apart"].values()) <= sides.TOLERANCE
    assert all(len(found[path]["ratios"]) == 2 for path in forms_of)
    needed = report["raw"]["stage 2, uncached, memory of a step, MiB"]["bytes"]
    assert needed["uncached"] < needed["theirs"]
    assert found["checkpoint weights, MB"]["ratio"] < 1
    assert report["command"].startswith("python -m benchmarks.run --preset tiny")
    assert "| import, s | **0.5** (0.5 to 0.5) |" in (tmp_path / "tiny-cpu.md").read_text()
    assert (tmp_path / "tiny-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_equal_is_not_timed():
    pairs_of_both = rows(3, seed=0)
    theirs, ours = sides.build(TINY, seed=0)
    assert max(sides.check_equal(theirs, ours, pairs_of_both).values()) <= sides.TOLERANCE
    with torch.no_grad():
        ours.model.projector.bias.add_(0.1)
    with pytest.raises(ValueError, match=r"logits are apart by .* a speed of a wrong result is no speed"):
        sides.check_equal(theirs, ours, pairs_of_both)
    ours.collator.query = "what?"
    with pytest.raises(ValueError, match="other batches of the same rows: input_ids, labels differ"):
        sides.check_equal(theirs, ours, pairs_of_both)


def test_what_is_left_out_is_left_out_and_changes_no_loss(monkeypatch):
    theirs, ours = sides.build(TINY, seed=0)
    pairs_of_both = rows(4, seed=0)
    chat, mixed = fast_paths.cases(TINY, theirs, ours, pairs_of_both, seed=0)
    recorded = []
    ours.model.language_model.base_model.register_forward_hook(
        lambda module, args, inputs, output: recorded.append(inputs["inputs_embeds"].shape[:2].numel()),
        with_kwargs=True,
    )
    for case in (chat, mixed):
        tokens = {}
        for name in ("plain", "ours"):
            side = getattr(case, name)
            recorded.clear()
            training.step_of(side, case.rows, "cpu", False)()
            tokens[name] = sum(recorded)
        assert tokens["ours"] < 0.8 * tokens["plain"], case.name
        assert max(fast_paths.check_equal(case, case.rows).values()) <= sides.TOLERANCE
    shared = chat.ours.collator(pairs_of_both)["shared_input_ids"].shape[1]
    assert shared == chat.ours.collator(pairs_of_both)["input_ids"][0].tolist().index(ours.model.config.image_token_id)
    # a packed row whose documents see each other
    packed = type(mixed.ours.collator).__call__

    def leaking(self, rows):
        batch = packed(self, rows)
        if "sequence_ids" in batch:
            batch["attention_mask"] = (batch.pop("sequence_ids") >= 0).long()
        return batch

    monkeypatch.setattr(type(mixed.ours.collator), "__call__", leaking)
    with pytest.raises(ValueError, match="mixed lengths, packed: losses are apart by"):
        fast_paths.check_equal(mixed, mixed.rows)


def test_texts_of_a_picture_that_see_each_other_are_not_timed(monkeypatch):
    theirs, ours = sides.build(TINY, seed=0)
    for case in several_texts.cases(TINY, theirs, ours, rows(2, seed=0), seed=0):
        batch = case.theirs.collator(pairs_of(case.rows))
        assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 10  # a picture and a row for each pair
        assert len(case.ours.collator(case.rows)["pixel_values"]) == 2
        assert max(several_texts.check_equal(case, case.rows).values()) <= sides.TOLERANCE
        forward = type(ours.model).forward

        def leaking(self, *, forward=forward, text_ids=None, **inputs):
            return forward(self, **inputs)

        with monkeypatch.context() as patch:
            patch.setattr(type(ours.model), "forward", leaking)
            with pytest.raises(ValueError, match=f"{case.name}: the two are apart by"):
                several_texts.check_equal(case, case.rows)
        case.rows[1] = case.rows[1] | {"text": case.rows[1]["text"][::-1]}
        other = sides.Side(theirs.model, lambda _, batch=batch: batch)
        with pytest.raises(ValueError, match=f"{case.name}: the two learn other labels"):
            several_texts.check_equal(replace(case, theirs=other), case.rows)


def test_captions_that_are_not_equal_are_not_timed():
    theirs, ours = sides.build(TINY, seed=0)
    built = {"theirs": theirs, "ours": ours}
    inputs = generation.inputs_of(ours.collator, rows(2, seed=0), ours.model.device)
    assert inputs["theirs"].keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert max(generation.check_equal(built, inputs).values()) <= sides.TOLERANCE
    with torch.no_grad():
        ours.model.projector.bias.add_(0.1)
    with pytest.raises(ValueError, match="logits of captions are apart"):
        generation.check_equal(built, inputs)


def test_both_sides_are_compiled_and_stand_in_a_table_of_their_own(tmp_path, monkeypatch):
    """But for inductor's own work, which takes minutes, and more layers than one, which would be traced one by one."""
    layers = {"num_hidden_layers": 1}
    text = type(TINY.text).from_dict(TINY.text.to_dict() | layers)
    small = replace(TINY, text=text, vision=TINY.vision | layers, qformer=TINY.qformer | layers)
    monkeypatch.setitem(run.PRESETS, "tiny", small)
    monkeypatch.setattr(compiled.torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compiled, "CompileConfig", partial(CompileConfig, backend="eager"))
    options = "--preset tiny --batch_size 2 --rounds 2 --sizes 2 --tokens 3 --compile"
    assert run.main([*options.split(), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "tiny-cpu-compiled.json").read_text())
    found = {row["path"]: row for row in report["rows"]}
    assert list(found) == compiled.paths([2])
    assert all(row["ours"] > 0 and row["theirs"] > 0 and row["not_run"] is None for row in found.values())
    assert all(len(row["ratios"]) == (0 if "first compiled" in path else 2) for path, row in found.items())
    graphs = report["raw"][compiled.STEP]["graphs"]
    assert graphs["ours"] == {"graphs": 1, "breaks": {}}
    assert graphs["theirs"]["graphs"] >= 1
    assert report["raw"][compiled.CAPTIONS.format(2)]["graphs"] == 2  # one a side, whatever the call
    assert {path for goal in goals.GOALS.values() for path in goal if "compiled" in path} <= {
        *compiled.paths([1, 8, 64])
    }


def test_where_there_is_no_compiler_the_rows_say_so(tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    options = "--preset tiny --batch_size 2 --rounds 1 --sizes 2 --compile"
    assert run.main([*options.split(), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "tiny-cpu-compiled.json").read_text())
    assert [row["path"] for row in report["rows"]] == compiled.paths([2])
    assert all("compiler" in row["not_run"] and row["ours"] is None for row in report["rows"])
    assert f"| {compiled.STEP} | not run: " in (tmp_path / "tiny-cpu-compiled.md").read_text()


def test_a_side_that_does_not_compile_is_told_with_its_error_beside_the_other():
    failed = {"theirs": compiled.error_cell(ValueError("\nno such | operator\nand much more"))}
    row = compiled._compared("a", 8, {"ours": [2.0, 4.0]}, failed, lambda taken: 1.0)
    row.goal = 1.5
    expected = "| a | not run: theirs, ValueError: no such / operator | ≥ 1.5: open |  |  | 2.67 |  |  |"
    assert expected in table.markdown([row], ())


def test_stage_1_that_is_not_equal_is_not_timed():
    built = stage1.build(TINY, seed=0)
    assert max(stage1.check_equal(built, rows(4, seed=0)).values()) <= sides.TOLERANCE
    several = with_texts(rows(2, seed=0), 3, seed=0)
    for side in built.values():  # weights of this width hardly mix tokens, and all texts are alike
        for name, parameter in side.model.named_parameters():
            if "qformer" in name and ".attention." in name:
                parameter.data.mul_(10)
    assert max(stage1.check_equal(built, several).values()) <= sides.TOLERANCE
    batch = built["plain"].collator(pairs_of(several))
    assert len(batch.pop("image_ids")) == len(batch["pixel_values"]) == 6
    with torch.no_grad():  # a picture's texts are drawn as its negatives
        without, loss = (
            side.model(**inputs)["loss_itm"]
            for side, inputs in ((built["plain"], batch), (built["ours"], built["ours"].collator(several)))
        )
    assert abs(without - loss) > 10 * sides.TOLERANCE
    with torch.no_grad():
        built["separate"].model.text_head.bias[7] += 1
    with pytest.raises(ValueError, match="losses of stage 1 are apart"):
        stage1.check_equal(built, rows(4, seed=0))


def test_an_opt_is_put_together_as_well():
    """The shape of the GPU's preset, but for its size."""
    text = PRESETS["blip2-opt-2.7b"].text.to_dict() | {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 640}
    text = type(PRESETS["blip2-opt-2.7b"].text).from_dict(
        text | {"num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32}
    )
    small = replace(TINY, text=text, lora_targets=PRESETS["blip2-opt-2.7b"].lora_targets)
    theirs, ours = sides.build(small, seed=0)
    assert max(sides.check_equal(theirs, ours, rows(2, seed=0)).values()) <= sides.TOLERANCE


def test_a_preset_too_large_for_the_memory_is_refused_with_the_estimate(monkeypatch):
    monkeypatch.setattr(floor.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**29))
    expected = r"smollm2 with batches of 64 takes about \d.\d GiB \(weights of both models 2.0, .*has 0.5 GiB free"
    with pytest.raises(ValueError, match=expected):
        run.main(["--preset", "smollm2"])


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU")
    with pytest.raises(ValueError, match="torch sees no CUDA GPU"):
        run.main(["--preset", "tiny", "--device", "cuda"])


def test_memory_is_what_stands_at_once():
    assert memory.peak([4, 2, -4, 3, -5]) == 6

    def step():
        kept = torch.ones(2**20)
        del kept
        return torch.ones(3, 2**20).sum()

    assert 12 * 2**20 <= memory.step_bytes(step, "cpu") < 13 * 2**20


def test_caption_lengths_are_those_of_coco():
    lengths = torch.tensor([len(text.split()) for text in captions(300, seed=1)]).float()
    assert abs(lengths.mean() - 10.5) < 0.5
    assert abs(lengths.std() - 2.4) < 0.4
    assert len({len(text.split()) for text in captions(2, seed=3)}) == 2
    assert rows(2, seed=1) == rows(2, seed=1)
    mixed = torch.tensor([len(text.split()) for text in captions(300, seed=1, mixed=True)]).float()
    assert 9 < mixed.median() < 12
    assert mixed.std() > 10
    assert (mixed.min(), mixed.max()) == (3, 100)


def test_a_goal_is_met_from_its_own_side():
    faster = table.speed("a", 8, ours=[1.0, 2.0, 1.0], theirs=[2.0, 3.0, 1.0])
    assert faster.ratios == [2.0, 1.5, 1.0]
    assert faster.met is None
    faster.goal = 1.5
    assert faster.met
    smaller = table.cost("b", ours=[3.0], theirs=[4.0])
    smaller.goal = 0.5
    assert smaller.met is False
    assert "| a | **1.5** (1 to 2) | ≥ 1.5: met |  |  | 8 | 4 |  |" in table.markdown([faster, smaller], ())
    faster.bound, smaller.bound, faster.reached = 2, 0.6, 0.5
    assert (faster.share, smaller.share) == pytest.approx((0.75, 0.8))
    assert "| ≥ 1.5: met | 2 | 75% | 8 | 4 | 50% |" in table.markdown([faster, smaller], ())
    assert "| 0.6 | 80% | 3 | 4 |  |" in table.markdown([faster, smaller], ())
    assert "≤ 0.5: not met" in table.markdown([faster, smaller], ())


def test_growth_is_measured_point_by_point(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    options = "--shapes tiny --batch_sizes 1 4 --image_tokens 2 --caption_tokens 8 16 --texts_per_image 1 4"
    options += " --cache_rows 20 2000"
    assert growth.main([*options.split(), "--usual", "2", "4", "15", "--repeats", "1", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "growth.json").read_text())
    points = {(point["axis"], point["kind"], point["size"]): point for point in report["points"]}
    sizes = [("batch", 1), ("batch", 4), ("image", 2), ("caption", 8), ("caption", 16), ("texts", 1), ("texts", 4)]
    recorded = {(axis, kind, size) for axis, size in sizes for kind in ("pictures", "features")}
    assert points.keys() == recorded | {("cache", "cache", 20), ("cache", "cache", 2000)}
    assert "2,000 rows take 0.0 GB, and " in points["cache", "cache", 2000]["left_out"]
    assert "minutes at least" in capsys.readouterr().out.splitlines()[0]
    measured = [point for point in points.values() if point["left_out"] is None]
    assert len(measured) == 15
    assert all(point["pairs_per_s"] > 0 for point in measured)
    features, pictures = (points["batch", kind, 4] for kind in ("features", "pictures"))
    assert features["operations"] < pictures["operations"]
    assert points["batch", "pictures", 1]["operations"] * 4 == pytest.approx(pictures["operations"], rel=1e-3)
    one, four = (points["texts", "pictures", count] for count in (1, 4))
    assert one["operations"] < four["operations"] < 4 * one["operations"]  # the picture and the prompt run once
    assert points["caption", "features", 8]["bytes"] < points["caption", "features", 16]["bytes"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "| tiny | cache | rows cached | 20 |" in (tmp_path / "growth.md").read_text()


def test_a_cost_that_outgrows_its_size_is_told():
    line = [growth.Point("tiny", "batch", "pictures", size, speed, 100 * size, 10 * size) for size, speed in
            ((1, 8.0), (2, 8.0), (4, 4.0))]  # fmt: skip
    (turn,) = growth.turns(line)
    assert (turn["from"], turn["to"], turn["kind"]) == (2, 4, "pictures")
    assert turn["powers"] == pytest.approx({"seconds": 2, "bytes": 1, "operations": 1})


def test_a_step_that_does_not_fit_is_left_out_with_the_estimate(monkeypatch):
    monkeypatch.setattr(floor.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    options = growth.Options(shapes=["tiny"], batch_sizes=[1], image_tokens=[], caption_tokens=[16], texts_per_image=[])
    found = list(growth.steps("tiny", options))
    assert len(found) == 4
    assert all("preset tiny with batches of" in point.left_out for point in found)


def test_other_rows_of_a_cache_are_read_each_time(tmp_path, monkeypatch):
    """What was read before comes from memory, however large the cache is."""
    growth.write_cache(tmp_path / "cache", 50, (2, 3))
    recorded = []
    monkeypatch.setattr(growth, "feature_opener", lambda _: lambda _features, place: recorded.append(place))
    growth.read(tmp_path / "cache", 50, growth.Options(usual=[1, 2, 2], repeats=2))
    assert len(recorded) == 128
    assert sorted(recorded[:64]) != sorted(recorded[64:])


def test_growth_says_first_what_it_takes_and_begins_nothing_when_time_is_over(tmp_path):
    options = growth.Options(shapes=["tiny", "smollm2"], minutes=0)
    printed = growth.needed(options, tmp_path)
    assert "The largest cache is 30.3 GB; " in printed
    assert "nothing is begun after 0 minutes" in printed
    late = [*growth.steps("tiny", options, until=0), *growth.caches("smollm2", options, tmp_path, until=0)]
    assert len(late) == 2 * (7 + 6 + 5 + 6) + 3
    assert all(point.left_out for point in late)
    assert {point.left_out for point in late if point.size < 10**5} == {"the 0 minutes were over"}
