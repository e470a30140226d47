"""README and docs/ hold what they say: every snippet is run or says why not, commands parse, links lead somewhere.

Each fenced block of Python or shell is checked, unless an HTML comment stands directly before it:

    <!-- not run: why -->             it is not checked, and the page's source says why
    <!-- run by tests/project/test_x.py -->   that test holds the block and what it runs together
    <!-- given: model, trainer -->    it is run, and these names are there already

What "run" means. Python: the blocks of a page are one script, run beside a Hub of the tests' own whose models are
tiny, in a process of all pages; training is cut to two steps. Shell: nothing is started. A line is split as a shell
does, and its arguments go to the parser that they would go to: those of `lorgnette`, of `python -m lorgnette.trainer`
and of `accelerate launch`, with the recipe that they name, are read to the end, and what would be done then is left
out. Of `python -m` something else each option has to be in its `--help`. Targets and variables of `make` have to be
in the Makefile, extras of `pip install` in pyproject.toml. Programs of others (`hf`, `curl` …) are only split.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import tiny_models
import torch
import typer
from repository import ROOT
from tiny_forms import stirred
from tiny_training import write_backbones, write_pairs
from typer.exceptions import TyperException

from lorgnette import (
    LorgnetteForConditionalGeneration,
    LorgnetteForImageTextRetrieval,
    LorgnetteProcessor,
    cli,
    hub_upload,
)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
FENCE = re.compile(r"(?:<!-- ([^>]*) -->\n)?^( *)```(\w*)\n(.*?)^\2```$", flags=re.MULTILINE | re.DOTALL)
CHECKED = ("python", "bash")  # `text` is a drawing
OTHERS = ("hf", "curl", "export", "source", "git")
# what is given to snippets that say so
GIVEN = {
    "model": "model = LorgnetteForConditionalGeneration.from_pretrained('out/stage2')",
    "processor": "processor = LorgnetteProcessor.from_pretrained('out/stage2')",
    "lm": "lm = AutoModelForCausalLM.from_pretrained('HuggingFaceTB/SmolLM2-360M-Instruct')",
    "trainer": """
processor = LorgnetteProcessor.from_pretrained('out/stage2')
trainer = Trainer(
    LorgnetteForConditionalGeneration.from_pretrained('out/stage2'),
    TrainingArguments('out/run', remove_unused_columns=False, hub_model_id='me/run'),
    train_dataset=load_dataset('my-pictures', split='train'),
    data_collator=LorgnetteCollator(processor),
    processing_class=processor,
)""",
}
BEFORE = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor

whole = TrainingArguments.__post_init__

def short(self):
    self.max_steps, self.per_device_train_batch_size, self.use_cpu, self.report_to = 2, 2, True, "none"
    whole(self)

TrainingArguments.__post_init__ = short
"""
RUN_ALL = """
import json, os, runpy, sys, traceback
outcomes = []
for place in sys.argv[1:]:
    os.chdir(place)
    try:
        runpy.run_path("snippets.py")
        outcomes.append("")
    except BaseException:
        outcomes.append(traceback.format_exc())
print(json.dumps(outcomes))
"""


@dataclass(frozen=True)
class Snippet:
    page: str
    line: int
    comment: str
    language: str
    code: str

    @property
    def left_out(self) -> bool:
        return self.comment.startswith(("not run: ", "run by "))

    @property
    def runs(self) -> bool:
        return self.language == "python" and not self.left_out


def snippets() -> list[Snippet]:
    found = []
    for name, path in zip(NAMES, PAGES, strict=True):
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            found.append(Snippet(name, text[: match.start(3)].count("\n") + 1, match[1] or "", match[3], match[4]))
    return found


SNIPPETS = snippets()


PAGES_THAT_RUN = sorted({one.page for one in SNIPPETS if one.runs})


def commands() -> list[tuple[str, str]]:
    """Where each line of shell stands, and the line."""
    found = []
    for one in SNIPPETS:
        if one.language == "bash" and not one.left_out:
            lines = one.code.replace("\\\n", " ").splitlines()
            found += [(f"{one.page}:{one.line}", line) for line in lines if shlex.split(line, comments=True)]
    return found


def test_every_block_is_a_snippet_that_is_found():
    for name, path in zip(NAMES, PAGES, strict=True):
        marks = re.findall(r"^ *```", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert len(marks) == 2 * sum(one.page == name for one in SNIPPETS), name


@pytest.mark.parametrize("one", SNIPPETS, ids=lambda one: f"{one.page}:{one.line}")
def test_a_snippet_is_run_or_says_why_not(one):
    if one.comment.startswith("run by "):
        test = ROOT / one.comment.removeprefix("run by ")
        assert one.page in test.read_text(encoding="utf-8"), f"{test.name} does not know {one.page}"
    elif one.comment.startswith("given: "):
        assert one.language == "python"
        assert set(one.comment.removeprefix("given: ").split(", ")) <= set(GIVEN)
    elif one.comment.startswith("not run: "):
        assert len(one.comment) > len("not run: ") + 10
    else:
        assert one.comment == ""
        assert one.language in (*CHECKED, "text"), f"{one.language or 'a block without a language'} is not run"
    if one.language == "python":
        compile(one.code, one.page, "exec")


class _Parsed(BaseException):
    """Raised in place of the work."""


def _stop(*_args, **_kwargs):
    raise _Parsed


def _parse(function, *arguments) -> None:
    with pytest.raises(_Parsed):
        function(*arguments)


@pytest.fixture
def parse(monkeypatch, capsys):
    """Give a command's arguments to what would read them; anything that it does not know fails."""
    monkeypatch.chdir(ROOT)  # where `recipes/` is
    for module, work in (
        ("trainer.stage1", "train"),
        ("trainer.stage2", "train"),
        ("trainer.stage1", "dry_run"),
        ("trainer.stage2", "dry_run"),
        ("trainer.init", "write"),
        ("trainer.cache", "write_cache"),
        ("trainer.evaluate", "evaluate"),
        ("trainer.retrieval", "measure"),
        ("hub_upload", "set_up_logging"),
    ):
        monkeypatch.setattr(importlib.import_module(f"lorgnette.{module}"), work, _stop)

    def trainer(command, *arguments):
        _parse(importlib.import_module(f"lorgnette.trainer.{command}").main, list(arguments))

    def lorgnette(command, *arguments):
        if command == "--debug":
            lorgnette(*arguments)
        elif command == "train":
            trainer(*arguments)
        elif command in ("init", "check", "cache", "evaluate"):
            trainer(command, *arguments)
        elif command == "push":
            _parse(hub_upload.run, list(arguments))
        elif command == "export":
            _parse(hub_upload.run, [arguments[0], "--dry-run", "--export-dir", *arguments[1:]])
        else:
            typer.main.get_command(cli.app).commands[command].make_context(command, list(arguments))

    def module(name, *arguments):
        if name == "lorgnette.trainer":
            trainer(*arguments)
        elif name == "lorgnette.hub_upload":
            _parse(hub_upload.run, list(arguments))
        elif name != "lmms_eval":
            main = importlib.import_module(f"{name}.__main__" if _is_package(name) else name).main
            with pytest.raises(SystemExit) as ended:
                main(["--help"])
            assert ended.value.code in (0, None)
            options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
            assert {one.partition("=")[0] for one in arguments if one.startswith("--")} <= options | {"--help"}

    def python(first, *arguments):
        if first == "-m":
            module(*arguments)
        else:
            assert first == "hub_upload.py"
            _parse(hub_upload.run, list(arguments))

    def accelerate(*arguments):
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(arguments[1:])
        assert arguments[0] == "launch"
        assert launched.module
        module(launched.training_script, *launched.training_script_args)

    def make(*arguments):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for one in arguments:
            name, equals, _ = one.partition("=")
            pattern = rf"^{name} \?=" if equals else rf"^{re.sub('^quality-.*', 'quality-%', name)}[: ]"
            assert re.search(pattern, makefile, flags=re.MULTILINE), f"the Makefile has no {name}"

    def pip(_install, wanted, *_):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(.*)\]", wanted)) <= set(extras)

    readers = {"lorgnette": lorgnette, "python": python, "accelerate": accelerate, "make": make, "pip": pip}
    return readers | dict.fromkeys(OTHERS, lambda *_: None)


def _is_package(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.submodule_search_locations is not None


@pytest.mark.parametrize(("where", "line"), commands(), ids=lambda value: value[:60])
def test_a_shell_command_is_one_that_its_parser_takes(parse, where, line):
    program, *arguments = shlex.split(re.sub(r"^([A-Z_]+=\S+ )+", "", line), comments=True)  # variables of the process
    parse[program](*arguments)


@pytest.mark.parametrize(
    "line",
    [
        "lorgnette serve m --no-such-option 1",
        "lorgnette no-such-command",
        "lorgnette train stage2 --config recipes/no-such-file.yaml",
        "lorgnette evaluate --model m --dataset d --no_such_option 1",
        "lorgnette push out --repo-id a/b --no-such-option",
        "python -m lorgnette.trainer no-such-command",
        "python -m benchmarks.no_such_module",
        "python -m benchmarks.run --no_such_option 1",
        "make no-such-target",
        "make test NO_SUCH_VARIABLE=1",
        "pip install '.[no_such_extra]'",
        "no-such-program",
    ],
)
def test_a_command_that_is_none_is_found_out(parse, line):
    program, *arguments = shlex.split(line)
    with pytest.raises((SystemExit, TyperException, AssertionError, KeyError, ModuleNotFoundError)):
        parse[program](*arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory, hub):
    """A folder with what the pages speak of, and a Hub with the repositories that they name, all tiny."""
    folder = tmp_path_factory.mktemp("world")
    parts = folder / "parts"
    vision, text = write_backbones(parts)
    bert = str(parts / "bert")
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(bert)
    names = ("google/siglip2-base-patch16-224", "HuggingFaceTB/SmolLM2-360M-Instruct", "google-bert/bert-base-uncased")
    for name, part in zip(names, (vision, text, bert), strict=True):
        hub.add(name, Path(part))
    write_pairs(folder / "my-pictures")
    for number, name in enumerate(("cat.jpg", "dog.jpg", "dog.png")):
        tiny.picture(number).save(folder / name)
    processor = LorgnetteProcessor.from_backbones(vision, text, num_query_tokens=tiny_models.NUM_QUERY_TOKENS)
    for seed, name in enumerate(("stage2", "charts")):
        torch.manual_seed(seed)
        model = LorgnetteForConditionalGeneration.from_backbones(
            vision, text, processor=processor, qformer_config=tiny_models.QFORMER, lora={"r": 2}
        )
        stirred(model).save_pretrained(folder / "out" / name)
    processor.num_query_tokens = 16
    model = LorgnetteForConditionalGeneration.from_backbones(
        vision, text, processor=processor, qformer_config=tiny_models.QFORMER, lora={"r": 2}
    )
    model.config.elastic_queries = True
    model.save_pretrained(folder / "out" / "elastic")
    hub.add("me/my-eyes", folder / "out" / "stage2")
    stage1 = LorgnetteProcessor.from_backbones(
        vision, None, qformer=bert, num_query_tokens=tiny_models.NUM_QUERY_TOKENS
    )
    LorgnetteForImageTextRetrieval.from_backbones(
        vision, qformer=bert, processor=stage1, num_query_tokens=tiny_models.NUM_QUERY_TOKENS
    ).save_pretrained(folder / "out" / "stage1")
    return folder


@pytest.fixture(scope="module")
def outcomes(world, hub):
    """Page -> where its script failed, or nothing: one process runs all of them, each in a folder of its own."""
    for page in PAGES_THAT_RUN:
        place = world / "places" / page
        shutil.copytree(world, place, ignore=shutil.ignore_patterns("places", "parts"))
        script = [BEFORE]
        for one in SNIPPETS:
            if one.page == page and one.runs:
                script += [GIVEN[name] for name in one.comment.removeprefix("given: ").split(", ") if name]
                script.append(one.code)
        (place / "snippets.py").write_text("\n".join(script), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(world / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "HF_TOKEN": "token-of-me"}
    command = [sys.executable, "-c", RUN_ALL, *(str(world / "places" / page) for page in PAGES_THAT_RUN)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(PAGES_THAT_RUN, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_the_python_of_a_page_runs(outcomes, page):
    assert not outcomes[page], outcomes[page]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def anchors(page: Path) -> set[str]:
    """What GitHub and mkdocs call the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", [*NAMES, "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"https?://", target):
            continue
        found = page.parent / path if path else page
        assert found.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(found), f"{name}: {target}"


def test_the_map_names_what_is_there():
    """Folders and files that docs/architecture.md names; a file without a folder is in one of them."""
    if not (ROOT / "assembly").is_dir():
        pytest.skip("the code is not in this layout yet")
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.(?:py|md)|/))`", text)) - {"lm_adapter/"}  # which is in a saved model
    assert len(named) > 60
    files = {path.name for folder in ROOT.glob("[a-z]*/") for path in folder.glob("*.py")}
    assert [name for name in sorted(named) if not (ROOT / name).exists() and name not in files] == []


def test_a_line_of_a_page_begins_no_html():
    """`<IMAGE>` at the beginning of a line would hide what follows, in mkdocs as on GitHub."""
    for name, path in zip(NAMES, PAGES, strict=True):
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"^\s*<[A-Za-z]", text, flags=re.MULTILINE), name


@pytest.mark.slow
def test_a_name_that_is_not_there_fails_the_build(tmp_path):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    ignored = shutil.ignore_patterns(".*", "out", "site", "results", "tests", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    shutil.copytree(ROOT / "results", tmp_path / "copy" / "results")

    def build() -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
        return subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True, timeout=300)

    assert build().returncode == 0
    module = tmp_path / "copy" / "trainer" / "collator.py"
    module.write_text(module.read_text("utf-8").replace("[`~LorgnetteProcessor.build_prompt`]", "[`no_such_name`]"))
    done = build()
    assert done.returncode != 0
    assert "no_such_name" in done.stderr
    with open(tmp_path / "copy" / "docs" / "index.md", "a") as page:
        page.write("\n[gone](gone.md)\n")
    assert "gone.md" in build().stderr
