"""The page to play with: what it answers, what it shows, and what it says of what cannot be used."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub import SpaceCard
from tiny_inspection import STEPS, rows, train, untrained
from tiny_training import write_backbones
from without_lorgnette import WITHOUT_LORGNETTE

from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor, cli
from lorgnette.processing.pipeline_lorgnette import LorgnetteImageToTextPipeline
from lorgnette.publishing.guards import check_folder
from lorgnette.publishing.space import write_space
from lorgnette.serving.app import ask, stream


QUESTION = "Describe the picture."
MAX_NEW_TOKENS = 8
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two bridges over one ViT and LM, of which the first can name colours, and pictures of these."""
    made = tmp_path_factory.mktemp("bridges")
    backbones = write_backbones(made)
    for name, steps in (("one", 2 * STEPS), ("two", 2)):
        model, processor = untrained(backbones)
        train(model, LorgnetteCollator(processor), steps).save_pretrained(made / name)
        processor.save_pretrained(made / name)
    for row in rows(2):
        row["image"].save(made / f"{row['index']}.png")
    (made / "broken.png").write_bytes(b"GIF89a, it says")
    return made


@pytest.fixture(scope="module")
def launched(folder):
    """The page as `lorgnette app` builds it, and the settings that it is launched with."""
    recorded = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_check_free", lambda host, port: None)  # it is not listened on
        patch.setattr(gr.Blocks, "launch", lambda page, **settings: recorded.update(page=page, settings=settings))
        patch.setattr(sys, "argv", ["lorgnette", "app", str(folder / "one"), "--bridge", f"two={folder / 'two'}",
                                    "--max-new-tokens", str(MAX_NEW_TOKENS), "--device", "cpu"])  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    return recorded


@pytest.fixture(scope="module")
def pipes(launched):
    (asking,) = (event.fn for event in launched["page"].fns.values())
    return asking.args[0]


def expected(folder, bridge: str, number: int, use_lora: bool = True) -> str:
    model = LorgnetteForConditionalGeneration.from_pretrained(folder / bridge).eval()
    pipe = LorgnetteImageToTextPipeline(model=model, processor=LorgnetteProcessor.from_pretrained(folder / bridge))
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "generate_kwargs": {"do_sample": False}}
    with nullcontext() if use_lora else model.disable_adapter():
        return pipe(str(folder / f"{number}.png"), prompt=QUESTION, **settings)[0]["generated_text"]


def test_it_listens_on_this_machine_alone_and_fetches_nothing(launched):
    settings = launched["settings"]
    assert (settings["server_name"], settings["server_port"], settings["share"]) == ("127.0.0.1", 7860, False)
    assert launched["page"].analytics_enabled is False
    assert settings["theme"]._stylesheets == []
    assert "@font-face" not in settings["theme"]._get_theme_css()


def test_an_error_stands_over_one_box_rather_than_all(launched):
    (asking,) = launched["page"].fns.values()
    assert [box.label for box in asking.show_progress_on] == ["Answer"]


@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.parametrize(("shown", "bridge"), [("default", "one"), ("two", "two")])
def test_both_pictures_are_answered_as_the_pipeline_answers(pipes, folder, shown, bridge, use_lora):
    pictures = [str(folder / f"{seed}.png") for seed in range(2)]
    *_, (answer, maps, other, other_maps) = ask(pipes, MAX_NEW_TOKENS, *pictures, QUESTION, shown, use_lora)
    if use_lora and bridge == "one":
        assert (answer, other) == tuple(row["text"] for row in rows(2))
    assert answer == expected(folder, bridge, 0, use_lora)
    assert other == expected(folder, bridge, 1, use_lora)
    for text, drawn in ((answer, maps), (other, other_maps)):
        titles = [title for _, title in drawn]
        assert titles[0] == "queries"
        assert text.startswith(" ".join(titles[1:]))
        assert np.ptp(np.asarray(drawn[0][0]), axis=-1).max() > 20  # colours over grey
    assert not np.array_equal(*(np.asarray(drawn[0][0]) for drawn in (maps, other_maps)))


def test_an_answer_comes_piece_by_piece_and_without_another_picture_alone(pipes, folder):
    steps = list(ask(pipes, MAX_NEW_TOKENS, str(folder / "0.png"), None, QUESTION, "default", True))
    answers = [step[0] for step in steps]
    assert answers[0] == ""
    assert answers[-1] == expected(folder, "one", 0)
    assert len(set(answers)) > 2
    assert all(answers[-1].startswith(answer) for answer in answers)
    assert all(step[2:] == ["", None] for step in steps)


def test_who_stops_listening_stops_the_model(pipes, folder):
    pipe, calls = pipes["default"], []
    pipe.model.set_bridge("default")
    prompt = dict(pipe.preprocess(rows(1)[0]["image"], prompt=QUESTION))
    counting = pipe.model.register_forward_hook(lambda *_: (calls.append(1), time.sleep(0.02))[1])
    try:
        with pipe.model.disable_adapter():  # without LoRA it does not come to an end
            list(stream(pipe, prompt, 40))
            whole = len(calls)
            saying = stream(pipe, prompt, 40)
            next(saying)
            saying.close()
    finally:
        counting.remove()
    assert whole == 40
    assert len(calls) - whole < 20


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"picture": None}, "Drop a picture first"),
        ({"picture": "broken.png"}, "broken.png: the picture cannot be read|broken.png: the picture is no picture"),
        ({"other": "broken.png"}, "broken.png: "),
        ({"question": " "}, "is empty"),
        ({"question": "a " * 50_000}, "has 100000 characters; 50000 are allowed"),
        ({"question": "a " * 999}, r"are \d+ tokens; with 8 of an answer that is more than the 256"),
    ],
)
def test_what_cannot_be_used_is_told(pipes, folder, changed, message):
    given = {"picture": "0.png", "other": "1.png", "question": QUESTION} | changed
    files = [given[name] and str(folder / given[name]) for name in ("picture", "other")]
    asking = ask(pipes, MAX_NEW_TOKENS, *files, given["question"], "default", True)
    assert next(asking) == ["", None, "", None]
    with pytest.raises(gr.Error, match=message) as told:
        next(asking)
    assert told.value.print_exception is False


def test_a_space_is_what_may_be_published_and_names_the_model(folder):
    write_space(folder / "one", "me/my-eyes")
    space = folder / "one" / "space"
    assert sorted(path.name for path in space.iterdir()) == [
        "README.md", "app.py", "drawing.py", "maps.py", "requirements.txt"]  # fmt: skip
    card = SpaceCard.load(space / "README.md").data
    assert (card.models, card.sdk, card.app_file) == (["me/my-eyes"], "gradio", "app.py")
    assert "torch>=" in (space / "requirements.txt").read_text()
    assert "space/app.py" in check_folder(folder / "one")


SPACE = """
import json, sys
sys.path.insert(0, sys.argv[1] + "/space")
import app
shown = {}
app.gr.Blocks.launch = lambda page, **_: shown.update(page=page)
app.main(sys.argv[1])
(asking,) = (event.fn for event in shown["page"].fns.values())
*_, last = asking(sys.argv[2], None, sys.argv[3], "default", True)
print(json.dumps([last[0], len(last[1])]))
"""


@pytest.mark.slow
def test_a_space_needs_no_lorgnette(folder, tmp_path):
    shutil.copytree(folder / "one", tmp_path / "export")
    shutil.rmtree(tmp_path / "export" / "space", ignore_errors=True)
    write_space(tmp_path / "export", "me/my-eyes")
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_LORGNETTE + SPACE, str(tmp_path / "export"), str(folder / "0.png"), QUESTION],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    answer, maps = json.loads(finished.stdout.splitlines()[-1])
    assert maps > 1
    assert answer.startswith(expected(folder, "one", 0))


@pytest.fixture(scope="module")
def url(launched):
    settings = launched["settings"] | {"server_port": None, "prevent_thread_lock": True}  # a free port
    _, url, _ = launched["page"].launch(**settings)
    yield url.rstrip("/")
    launched["page"].close()


def test_lora_is_switched_by_booleans_and_by_words_for_them(launched):
    (switch,) = (box for box in launched["page"].blocks.values() if getattr(box, "label", None) == "LoRA")
    for on, off in ((True, False), ("on", "off"), ("True", "False"), (1, 0), ("1", "0")):
        assert (switch.preprocess(on), switch.preprocess(off)) == (True, False)
    for neither in ("perhaps", 2, None, "", []):
        with pytest.raises(gr.Error, match=r"use_lora is .*; on or off is needed") as told:
            switch.preprocess(neither)
        assert told.value.print_exception is False


@pytest.mark.slow
def test_gradios_client(url, folder):
    """A program asks as the page's API documentation tells it to, and by what stands on the page."""
    client = Client(url, verbose=False)
    parameters = client.view_api(return_format="dict")["named_endpoints"]["/ask"]["parameters"]
    offered = {one["parameter_name"]: one for one in parameters}
    assert offered["use_lora"]["python_type"]["type"] == "bool"
    assert offered["use_lora"]["parameter_default"] is True
    image = handle_file(str(folder / "0.png"))
    expected_answers = {use_lora: expected(folder, "one", 0, use_lora) for use_lora in (True, False)}
    assert expected_answers[True] != expected_answers[False]
    for use_lora in (True, False, "on", "off"):
        answer, maps, other, _ = client.predict(image, None, QUESTION, use_lora=use_lora, api_name="/ask")
        assert (answer, other) == (expected_answers[use_lora in (True, "on")], "")
        assert Path(maps[0]["image"]).stat().st_size > 0
    assert client.predict(image, image, QUESTION, api_name="/ask")[0] == expected_answers[True]
    assert client.predict(image, None, QUESTION, bridge="two", api_name="/ask")[0] == expected(folder, "two", 0)
    with pytest.raises(AppError, match="use_lora is 'perhaps'; on or off is needed"):
        client.predict(image, None, QUESTION, use_lora="perhaps", api_name="/ask")


@pytest.fixture(params=["light", "dark"])
def page(url, request):
    """The page in a browser, and what it asked the network for."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=120_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(color_scheme=request.param)
            page.set_default_timeout(120_000)
            asked = []
            page.on("request", lambda one: asked.append(one.url))
            page.goto(url)
            page.get_by_role("button", name="Ask").wait_for()
            yield page
            assert not [one for one in asked if not one.startswith((url, "data:", "blob:"))]
        finally:
            browser.close()


def upload(page, path: Path) -> None:
    with page.expect_response(lambda response: "/upload" in response.url):
        page.locator("input[type=file]").first.set_input_files(path)


def ask_again(page, answer, ask) -> None:
    """The page takes a question when it has heard that the one before has come to its end."""
    before = answer.input_value()
    for _ in range(600):
        ask()
        page.wait_for_timeout(100)
        if answer.input_value() != before:
            break


NOTE_VALUES = """box => {
    window.values = [];
    const note = () => { window.values.push(box.value); requestAnimationFrame(note); };
    note();
}"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser(page, pipes, folder, capfd):
    from playwright.sync_api import expect

    first, second = (page.get_by_label(label, exact=True) for label in ("Answer", "Answer to the other picture"))
    maps = page.locator(".thumbnail-item img")
    upload(page, folder / "0.png")
    first.evaluate(NOTE_VALUES)
    slow = pipes["default"].model.register_forward_hook(lambda *_: time.sleep(0.2))
    ask_again(page, first, page.get_by_role("button", name="Ask").click)  # the picture may not be in its place yet
    expect(first).to_have_value("a red car")
    expect(second).not_to_have_value("")
    slow.remove()
    assert {"a", "a red"} & set(page.evaluate("window.values"))
    expect(page.get_by_text("queries", exact=True)).to_have_count(2)
    assert maps.first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 336
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

    page.get_by_label("off", exact=True).check()
    page.get_by_label("Question").fill(QUESTION)
    ask_again(page, first, lambda: page.get_by_label("Question").press("Enter"))
    expect(first).to_have_value(expected(folder, "one", 0, use_lora=False))
    page.get_by_label("on", exact=True).check()
    page.get_by_label("two", exact=True).check()
    expect(page.get_by_text("queries", exact=True)).to_have_count(2)
    ask_again(page, first, page.get_by_role("button", name="Ask").click)
    expect(first).to_have_value(expected(folder, "two", 0))
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_broken_file_in_a_browser(page, folder, capfd):
    from playwright.sync_api import expect

    upload(page, folder / "broken.png")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text("broken.png: the picture")).to_be_visible()
    assert "Traceback" not in "".join(capfd.readouterr())
