"""Which source files travel with a saved model, and how they get into its folder.

`AutoModel.from_pretrained(folder, trust_remote_code=True)` runs those files where lorgnette is not installed. transformers
reads them from one flat folder and finds what to copy with a regular expression over their `from .module import X` lines
(`transformers/dynamic_module_utils.py`). This package keeps its code in folders, so the imports are flattened on the way out.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    # transformers copies only what a relative import names: naming every file here keeps the set whole, whichever is loaded
    from ..modeling.modeling_lora import check_lora_config
    from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
    from ..modeling.modeling_qformer import LorgnetteQFormerModel
    from ..processing.pipeline_lorgnette import LorgnetteImageToTextPipeline
    from ..processing.processing_lorgnette import LorgnetteProcessor
    from .configuration_lorgnette import LorgnetteConfig

    __all__ = [
        "LorgnetteConfig",
        "LorgnetteForConditionalGeneration",
        "LorgnetteImageToTextPipeline",
        "LorgnetteProcessor",
        "LorgnetteQFormerModel",
        "check_lora_config",
    ]

# folder of this package -> its modules that are remote code
REMOTE_CODE = {
    "configuration": ("configuration_lorgnette", "remote_code"),
    "modeling": (
        "modeling_backbones",
        "modeling_base",
        "modeling_lora",
        "modeling_lorgnette",
        "modeling_placeholders",
        "modeling_qformer",
    ),
    "processing": ("pipeline_lorgnette", "processing_lorgnette"),
}
_RELATIVE_IMPORT = re.compile(r"^(\s*)from \.+(?:\w+\.)*(\w+) import", flags=re.MULTILINE)


def save_remote_code(folder: str | Path) -> None:
    """Write the source files into `folder`, flat, so that transformers can load them as remote code.

    Works from the installed package and from code that was itself loaded as remote code, where the files lie side by side.

    Raises:
        FileNotFoundError: a source file is missing, so that the saved folder could not be loaded.
    """
    here = Path(__file__).parent
    for package_folder, names in REMOTE_CODE.items():
        for name in names:
            source = here / f"{name}.py"
            if not source.exists():
                source = here.parent / package_folder / f"{name}.py"
            text = source.read_text(encoding="utf-8")
            Path(folder, f"{name}.py").write_text(_RELATIVE_IMPORT.sub(r"\1from .\2 import", text), encoding="utf-8")
