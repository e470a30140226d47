"""What is said before torch is imported: recipes by name, and paths that do not exist."""

import subprocess
import sys

import pytest
from repository import ROOT

from lorgnette.trainer.__main__ import main
from lorgnette.trainer.early_checks import check_command_line
from lorgnette.trainer.recipe_files import find_recipe, read_recipe


NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "runs" / "good").mkdir(parents=True)
    (tmp_path / "stage1").mkdir()  # a folder is no recipe
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_recipes_of_the_package_are_found_by_name_in_any_folder(folder):
    for name in NAMES:
        assert find_recipe(name).samefile(ROOT / "recipes" / f"{name}.yaml")
    assert read_recipe("stage2")[0]["output_dir"] == "out/stage2"
    (folder / "stage2").write_text("seed: 1")  # a file goes first
    assert read_recipe("stage2") == ({"seed": 1}, {"seed": "1"})
    assert {"stage1", "stage2", "cache"} <= set(NAMES)


@pytest.mark.parametrize("name", ["stage3", "gone.yaml", "recipes/stage2", "../stage2", "stage2.yaml", ""])
def test_an_unknown_recipe_lists_those_that_exist(name):
    with pytest.raises(ValueError, match="no such file") as raised:
        find_recipe(name)
    assert f"Names of the package's recipes: {', '.join(NAMES)}" in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("stage2 --config gone.yaml", "stage2: error: cannot read the recipe gone.yaml: no such file"),
        ("stage2 --config=gone", "stage2: error: cannot read the recipe gone: no such file"),
        ("stage2 --config list.yaml", "the recipe list.yaml is not a mapping"),
        ("stage2 --config broken.yaml", "cannot read the recipe broken.yaml: mapping values are not allowed here"),
        ("stage3", "argument COMMAND: invalid choice: 'stage3'"),
        ("stage2 --dataset ./gone", "dataset './gone': no such file or folder (. contains "),
        ("cache --dataset rows.jsonl", "dataset 'rows.jsonl': no such file or folder"),
        (
            "stage1 --eval-dataset=out/gone",
            "eval_dataset 'out/gone': no such file or folder (no folder out; . contains",
        ),
        ("evaluate --model out/stage2", "model: there is no folder out/stage2 (no folder out; . contains"),
        ("stage2 --qformer runs/god", "qformer: there is no folder runs/god (runs contains good/; for a repository"),
        ("stage2 --vision /no/such/vit --text ./x", "vision: there is no folder /no/such/vit (no folder /no/such"),
        ("stage2 --text ~gone/lm.gguf", "text: there is no folder ~gone/lm.gguf"),
        ("stage2 --config vision.yaml", "vision: there is no folder ./vit"),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(folder, arguments, message):
    for name, text in (("list", "- a"), ("broken", "a: b: c"), ("vision", "vision: ./vit\nseed: 1")):
        (folder / f"{name}.yaml").write_text(text)
    code = (
        "import sys\nfrom lorgnette.trainer.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("python -m lorgnette.trainer")


def test_what_may_be_on_the_hub_or_exists_is_not_refused(folder, monkeypatch):
    (folder / "rows.csv").touch()
    (folder / "mine.yaml").write_text("vision: ./gone\ndataset: ./gone")
    for arguments in (
        "--vision google/vit --text gpt2 --dataset me/pictures --qformer null",
        "--dataset https://example.org/rows.csv --model runs/good",
        "--dataset data-{000..009}.tar --eval_dataset rows.csv",
        "--dataset runs/gone --format hub",
        "--config mine.yaml --vision google/vit --dataset rows.csv",
        "--config gone.yaml --help",
    ):
        check_command_line(arguments.split())


def test_commands_are_told_the_program_that_was_typed(monkeypatch):
    given = []
    monkeypatch.setattr("lorgnette.trainer.stage1.main", lambda argv, prog: given.append((argv, prog)))
    main(["stage1", "--seed", "1"])
    main(["stage1"], prog="lorgnette train")
    assert given == [(["--seed", "1"], "python -m lorgnette.trainer stage1"), ([], "lorgnette train stage1")]
