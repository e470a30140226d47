"""README's "Use" section, verbatim, after `pip install torch transformers peft pillow`."""

import re
import shutil
from pathlib import Path

import pytest


WITHOUT_LORGNETTE = "import importlib.util\nassert importlib.util.find_spec('lorgnette') is None"
README = Path(__file__).parents[1] / "README.md"


def snippets(heading: str) -> list[str]:
    """The Python code of one section of the README."""
    section = README.read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.mark.parametrize("form", ["thin", "full", "merged"])
def test_the_readme_in_a_fresh_environment(install, run, hub, folders, tmp_path, form):
    requirements = ["transformers", "peft", "pillow"]
    if form == "merged":
        requirements.remove("peft")
    python = install(f"fresh-{'-'.join(requirements)}", *requirements)
    hub.add("me/my-eyes", folders[form])
    for name in ("cat.jpg", "dog.png"):
        shutil.copy(folders[name], tmp_path)
    code = snippets("Use")
    assert len(code) == 2
    (tmp_path / "use.py").write_text("\n".join([WITHOUT_LORGNETTE, *code]), encoding="utf-8")
    run(python, "use.py", hub=hub.url)
