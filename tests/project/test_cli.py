"""`lorgnette COMMAND`: what each takes, where it goes, and what a mistake looks like."""

import re
import socket
import subprocess
import sys
import tomllib
from importlib.metadata import version

import datasets
import pytest
from repository import ROOT
from tiny import picture
from tiny_serving import save_bridges
from tiny_training import write_pairs
from torch.utils.data import DataLoader, Dataset

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor, cli
from lorgnette.processing.pipeline_lorgnette import LorgnetteImageToTextPipeline
from lorgnette.trainer.data import load_pairs
from lorgnette.trainer.messages import one_line


COMMANDS = ("init", "check", "train", "cache", "evaluate", "caption", "inspect", "export", "push", "serve", "app")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process; its status, what it said and its errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorgnette", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bridges")
    save_bridges(made)
    return made


@pytest.fixture
def handed_on(monkeypatch):
    """Module -> the arguments that its `main` was called with."""
    calls = {}
    for name in ("trainer.stage1", "trainer.stage2", "trainer.init", "trainer.cache", "trainer.evaluate", "hub_upload"):
        module = cli.importlib.import_module(f"lorgnette.{name}")
        function = "run" if name == "hub_upload" else "main"
        monkeypatch.setattr(module, function, lambda argv, name=name, **_: calls.update({name: argv}))
    return calls


def test_the_list_of_commands(run):
    status, output, _ = run()
    assert status == 0
    assert all(command in output for command in COMMANDS)
    assert run("--version")[:2] == (0, version("lorgnette") + "\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command):
    status, output, _ = run(command, "--help")
    assert status == 0
    assert f"Example: lorgnette {command} " in output


@pytest.mark.parametrize(
    ("command", "option"), [("evaluate", "--metrics"), ("cache", "--shard_size"), ("push", "--form")]
)
def test_help_of_what_is_handed_on_lists_all_options(run, command, option):
    assert option in run(command, "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "module", "given"),
    [
        ("train stage1 --config a.yaml --bf16 false", "trainer.stage1", "--config a.yaml --bf16 false"),
        ("train stage2 --lora {} --seed=3", "trainer.stage2", "--lora {} --seed=3"),
        ("check stage1 --config a.yaml", "trainer.stage1", "--config a.yaml --dry_run true"),
        ("check stage2 --seed=3", "trainer.stage2", "--seed=3 --dry_run true"),
        ("init --dataset d --force", "trainer.init", "--dataset d --force"),
        ("cache --dataset d --splits train test", "trainer.cache", "--dataset d --splits train test"),
        ("evaluate --model m --metrics cider bleu", "trainer.evaluate", "--model m --metrics cider bleu"),
        ("push out --repo-id me/x --private", "hub_upload", "out --repo-id me/x --private"),
        ("export out to --repo-id me/x", "hub_upload", "out --dry-run --export-dir to --repo-id me/x"),
    ],
)
def test_arguments_are_handed_on_as_they_stand(run, handed_on, arguments, module, given, tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("bf16: true")
    monkeypatch.chdir(tmp_path)
    assert run(*arguments.split())[0] == 0
    assert handed_on == {module: given.split()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("frobnicate", "No such command 'frobnicate'"),
        ("train", "name the stage first: stage1 or stage2"),
        ("train stage3", "name the stage first: stage1 or stage2"),
        ("check", "name the stage first: stage1 or stage2"),
        ("check stage2 --dry_rum true", "unknown option '--dry_rum' (did you mean dry_run?"),
        ("init", "dataset not given"),
        ("caption", "Missing argument"),
        ("caption m cat.png --max-new-tokens 0", "Invalid value for '--max-new-tokens'"),
        ("serve m --bridge charts", "--bridge charts: NAME=MODEL is needed"),
        ("serve m --bridge a=b --bridge a=c", "--bridge a is given twice"),
        ("serve m --api-key-env NO_SUCH_VARIABLE", "the environment has no NO_SUCH_VARIABLE"),
        ("serve m --port x", "Invalid value for '--port'"),
        ("app m --bridge charts", "--bridge charts: NAME=MODEL is needed"),
        ("serve m --port 70000", "Invalid value for '--port'"),
        ("serve m --port 0 --internal-host http://cdn.local", "'http://cdn.local' is not a host"),
        ("serve m --port 0 --allow-host cdn.local:80", "'cdn.local:80' is not a host"),
        ("app m --port 70000", "Invalid value for '--port'"),
        ("serve m --port 0 --name a --bridge default=b", "a bridge cannot be called 'default'"),
        ("serve m --host ::zz", "--host ::zz: "),
        ("push out", "lorgnette push: error: the following arguments are required: --repo-id"),
        ("export out to --no-such", "lorgnette export: error: unrecognized arguments: --no-such"),
        ("evaluate --no_such_option 1", "lorgnette evaluate: error: unknown option '--no_such_option'"),
        ("train stage2 --learning_rat 1", "lorgnette train stage2: error: unknown option '--learning_rat' (did you"),
        ("train stage1 --config gone", "lorgnette train stage1: error: cannot read the recipe gone: no such file"),
        ("cache --dataset ./gone", "lorgnette cache: error: dataset './gone': no such file or folder"),
        ("caption out/gone cat.png", "lorgnette caption: error: MODEL: there is no folder out/gone"),
        ("inspect ./gone", "lorgnette inspect: error: MODEL: there is no folder ./gone"),
        ("serve ./gone --port 0", "lorgnette serve: error: MODEL: there is no folder ./gone"),
    ],
)
def test_mistakes_are_told_in_a_line(run, arguments, message):
    status, _, errors = run(*arguments.split())
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
    *_, last = errors.splitlines()
    command = arguments.partition(" ")[0]
    assert last.startswith(("lorgnette: error: ", f"lorgnette {command}"))
    assert len(errors.splitlines()) <= 2


def test_errors_on_the_way_are_one_line_unless_debugging(run, monkeypatch, tmp_path):
    asked = ("caption", str(tmp_path / "none"), "cat.png")
    status, _, errors = run(*asked)
    assert status == 2
    assert errors == (
        f"lorgnette caption: error: MODEL: there is no folder {tmp_path / 'none'} ({tmp_path} contains nothing) "
        "(lorgnette --debug … shows where)\n"
    )
    monkeypatch.setattr(sys, "argv", ["lorgnette", "--debug", *asked])
    with pytest.raises(OSError, match="there is no folder"):
        cli.main()
    asked = ("export", str(tmp_path / "none"), str(tmp_path / "to"), "--repo-id", "me/x")
    status, _, errors = run(*asked)
    assert status == 2
    assert errors.startswith(f"lorgnette export: error: There is no folder {tmp_path / 'none'} (")
    monkeypatch.setattr(sys, "argv", ["lorgnette", "--debug", *asked])
    with pytest.raises(OSError, match="There is no folder"):
        cli.main()
    assert one_line(KeyError("x"), "lorgnette", "lorgnette").startswith("lorgnette: error: KeyError: 'x'")


class _Rows(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, position):
        try:
            raise OSError("not a picture")
        except OSError as error:
            raise ValueError("row 12: pics/broken.jpg cannot be read:\nnot a picture") from error


def test_an_error_of_a_data_loader_worker_is_its_own_message():
    with pytest.raises(ValueError, match="Original Traceback") as raised:
        list(DataLoader(_Rows(), num_workers=1))
    assert one_line(raised.value, "lorgnette train stage2", "lorgnette") == (
        "lorgnette train stage2: error: row 12: pics/broken.jpg cannot be read: not a picture "
        "(lorgnette --debug … shows where)"
    )


@pytest.mark.parametrize("command", ["serve", "app"])
def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(run, command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, _, errors = run(command, "no/such/model", "--port", port)
    assert status == 2
    assert "Address already in use" in errors
    assert port in errors


@pytest.mark.parametrize(
    ("arguments", "module", "kept"),
    [
        ("cache", "cache", "complete shards are kept, and the same command continues after them"),
        ("evaluate", "evaluate", "no answers and no figures were written; the same command starts again"),
        ("check stage2", "stage2", "nothing was trained; the same command starts again"),
        ("init", "init", "no recipe was written; the same command starts again"),
        ("train stage1", "stage1", "checkpoints are kept, and --resume_from_checkpoint true continues from the newest"),
    ],
)
def test_what_is_interrupted_says_in_a_line_what_is_kept(run, monkeypatch, arguments, module, kept):
    def interrupted(argv, prog):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lorgnette.trainer.{module}.main", interrupted)
    status, output, errors = run(*arguments.split())
    assert (status, output, len(errors.splitlines())) == (130, "", 1)
    name = "check" if arguments.startswith("check") else arguments
    assert errors.startswith(f"lorgnette {name}: interrupted: {kept}")


def test_a_package_that_is_missing_is_told_with_its_extra():
    expected_message = r"no_such is not installed: pip install 'lorgnette\[serve\]'"
    with pytest.raises(ImportError, match=expected_message), cli._extra("serve"):
        import no_such  # noqa: F401


def test_captions(run, folder, tmp_path):
    files = [str(tmp_path / f"{seed}.png") for seed in range(2)]
    for seed, file in enumerate(files):
        picture(seed).save(file)
    model = LorgnetteForConditionalGeneration.from_pretrained(folder / "one").eval()
    pipe = LorgnetteImageToTextPipeline(model=model, processor=LorgnetteProcessor.from_pretrained(folder / "one"))
    texts = [" ".join(pipe(file, prompt="What?", max_new_tokens=5)[0]["generated_text"].split()) for file in files]
    status, output, _ = run("caption", str(folder / "one"), *files, "--prompt", "What?", "--max-new-tokens", "5")
    assert status == 0
    assert output == "".join(f"{file}\t{text}\n" for file, text in zip(files, texts, strict=True))


def test_a_picture_that_cannot_be_read_is_an_error_and_the_others_are_captioned(run, folder, tmp_path):
    files = [str(tmp_path / name) for name in ("one.png", "broken.png", "gone.png", "two.png")]
    for file in (files[0], files[3]):
        picture(0).save(file)
    (tmp_path / "broken.png").write_bytes(b"words")
    status, output, errors = run("caption", str(folder / "one"), *files, "--max-new-tokens", "3")
    assert status == 2
    assert [line.partition("\t")[0] for line in output.splitlines()] == [files[0], files[3]]
    broken, gone, total = [line for line in errors.splitlines() if line.startswith("lorgnette caption: ")]
    assert files[1] in broken
    assert files[2] in gone
    assert (broken.count("broken.png"), gone.count("gone.png")) == (1, 1)
    assert total == "lorgnette caption: 2 of 4 pictures failed"


def test_the_help_of_a_stage_lists_what_people_set_first(run):
    for stage, own in (("stage1", "--qformer"), ("stage2", "--lora")):
        status, output, _ = run("train", stage, "--help")
        assert status == 0
        assert {"--dataset", "--learning_rate", "--output_dir", own} <= set(output.split())
        assert len(output.splitlines()) < 120
        assert f"lorgnette train {stage} --help-all lists the other options" in " ".join(output.split())
        assert "--adam_beta1" not in output
        assert "--adam_beta1" in run("train", stage, "--help-all")[1]


def test_the_example_of_train_works_as_printed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_pairs(tmp_path / "my-pictures")
    given = []
    monkeypatch.setattr("lorgnette.trainer.stage2.train", lambda *arguments: given.extend(arguments))
    (example,) = re.findall(r"Example: lorgnette (.+)", run("train", "--help")[1])
    status, _, errors = run(*example.split())
    assert (status, errors) == (0, "")
    rows, held_out = load_pairs(given[1], evaluate=True, seed=0)
    assert {"image", "text"} <= set(rows.column_names)
    assert len(rows) + len(held_out) == 12


def test_serving(run, folder, monkeypatch):
    served = {}
    monkeypatch.setattr("lorgnette.serving.worker.run", lambda *given: served.update(given=given))
    monkeypatch.setenv("WORKER_KEY", "sesame")
    options = (
        f"--bridge two={folder}/two --name one --port 0 --timeout 9 --internal-host cdn.local --api-key-env WORKER_KEY"
    )
    assert run("serve", str(folder / "one"), *options.split(), "--device", "cpu")[0] == 0
    engine, host, port, key = served["given"]
    assert (list(engine.processors), host, port, key) == (["one", "two"], "127.0.0.1", 0, "sesame")
    assert (engine.limits.timeout, engine.hosts.internal, engine.hosts.allowed) == (9.0, {"cdn.local"}, None)
    engine.batcher.stop()


def test_the_command_is_light_and_installed():
    heavy = {"torch", "transformers", "datasets", "fastapi", "gradio"}
    code = f"import sys, lorgnette.cli; print(sorted({heavy} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lorgnette": "lorgnette.cli:main"}
