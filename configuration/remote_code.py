"""Which source files travel with a saved model, and how they get into its folder.

`AutoModel.from_pretrained(folder, trust_remote_code=True)` runs those files where lorgnette is not installed, and an
Inference Endpoint of the folder runs `handler.py`, once it has installed `requirements.txt`. transformers reads them
from one flat folder and finds what to copy with a regular expression over their `from .module import X` lines
(`transformers/dynamic_module_utils.py`). This package keeps its code in folders, so the imports are flattened on the
way out.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    # transformers copies only what a relative import names: these name the rest, whichever file is loaded first
    from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration  # noqa: F401
    from ..modeling.modeling_retrieval import LorgnetteForImageTextRetrieval  # noqa: F401
    from ..processing.pipeline_lorgnette import LorgnetteImageToTextPipeline  # noqa: F401
    from ..processing.processing_lorgnette import LorgnetteProcessor  # noqa: F401
    from ..serving.handler import EndpointHandler  # noqa: F401
    from ..serving.web_images import read_web_image  # noqa: F401

_SOURCES = (
    *("configuration/*.py", "modeling/*.py", "processing/*.py", "serving/handler.py", "serving/web_images.py"),
    *("assembly/processors.py", "assembly/sources.py"),  # modeling/ still imports them
)
# As pyproject.toml says; torch is the Endpoint's own, built for its GPU
REQUIREMENTS = ("transformers>=5.17,<5.25", "peft>=0.19.1", "pillow>=11.0", "safetensors>=0.6")
_RELATIVE_IMPORT = re.compile(r"^(\s*)from \.+(?:\w+\.)*(\w+) import", flags=re.MULTILINE)


def save_remote_code(folder: str | Path) -> None:
    """Write the source files into `folder`, flat, so that transformers can load them as remote code.

    Works from the installed package, and from code that was itself loaded as remote code and lies side by side.
    """
    here = Path(__file__).parent
    flat = (here / "modeling_lorgnette.py").exists()
    for pattern in ["*.py"] if flat else _SOURCES:
        for source in (here if flat else here.parent).glob(pattern):
            if source.name != "__init__.py":
                text = _RELATIVE_IMPORT.sub(r"\1from .\2 import", source.read_text(encoding="utf-8"))
                Path(folder, source.name).write_text(text, encoding="utf-8")
    Path(folder, "requirements.txt").write_text("".join(f"{line}\n" for line in REQUIREMENTS), encoding="utf-8")
