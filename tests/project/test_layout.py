"""How the code is laid out: what is saved with a model, which way imports point, how long files are."""

import ast
import sys
from pathlib import Path

import pytest
from repository import ROOT
from tiny_models import QFORMER, language_model, vision_model
from tiny_retrieval import retriever
from transformers import GenerationMixin
from transformers.dynamic_module_utils import get_imports

from lorgnette import LorgnetteForConditionalGeneration, LorgnettePreTrainedModel
from lorgnette.configuration.configuration_lorgnette import CODE


# each imports from itself and from those before it; configuration, modeling and processing are saved with a model
LAYERS = (
    *("configuration", "modeling", "processing", "assembly", "trainer", "inspection", "publishing", "serving"),
    *("hub_upload", "cli", "__init__"),
)
MOST_FILES, MOST_LINES, LONGEST_FILE = 14, 3_630, 500


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    places = {name: tmp_path_factory.mktemp(name) for name in CODE}
    LorgnetteForConditionalGeneration.from_backbones(
        vision_model(), language_model(), qformer_config=QFORMER, lora={"r": 2}, num_query_tokens=4
    ).save_pretrained(places["lorgnette"])
    retriever().save_pretrained(places["lorgnette_retrieval"])
    return places


def test_little_code_is_saved_with_a_model(folders):
    for name, folder in folders.items():
        files = sorted(folder.glob("*.py"))
        assert {file.stem for file in files} == set(CODE[name])
        assert len(files) <= MOST_FILES
        assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= MOST_LINES


def test_what_is_saved_needs_what_transformers_torch_and_pillow_bring(folders):
    """transformers refuses to load a file that imports, at its top, a package that is not installed."""
    brought = {"PIL", "huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
    for folder in folders.values():
        for file in folder.glob("*.py"):
            assert {name for name in get_imports(file) if name not in sys.stdlib_module_names} <= brought, file.name


def test_neither_stage_has_code_of_the_other():
    stage2, stage1 = map(set, CODE.values())
    assert {"modeling_lorgnette", "modeling_headless", "modeling_lora", "pipeline_lorgnette"} <= stage2 - stage1
    assert {"configuration_retrieval", "modeling_retrieval", "modeling_contrastive"} <= stage1 - stage2


def test_the_model_is_composed():
    assert LorgnetteForConditionalGeneration.__bases__ == (LorgnettePreTrainedModel, GenerationMixin)


def imports() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, anywhere in it, by names below `lorgnette`."""
    files = [file for layer in LAYERS for file in (ROOT / layer).glob("*.py")]
    names = {f"{file.parent.name}.{file.stem}": file for file in files}
    names |= {name: ROOT / f"{name}.py" for name in ("hub_upload", "cli", "__init__")}
    graph = {}
    for name, file in names.items():
        package, found = name.split(".")[:-1], set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("lorgnette")):
                below = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*below, *(node.module or "").removeprefix("lorgnette").strip(".").split(".")])
                found |= {module.strip("."), *(f"{module}.{alias.name}".strip(".") for alias in node.names)}
        graph[name] = {f"{each}.__init__" if f"{each}.__init__" in names else each for each in found} & names.keys()
    return graph


def test_imports_point_one_way_and_make_no_circle():
    graph = imports()
    assert "modeling.modeling_base" in graph["modeling.modeling_lorgnette"]
    beneath = {name: LAYERS.index(name.split(".")[0]) for name in graph}
    up = [(name, other) for name, others in graph.items() for other in others if beneath[other] > beneath[name]]
    # a model loads the processor that is bundled with it: both are saved with a model
    assert up == [("modeling.modeling_saving", "processing.processing_lorgnette")]
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_file_is_long():
    files = [file for layer in LAYERS for file in (ROOT / layer).glob("*.py")] + list((ROOT / "tests").rglob("*.py"))
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
