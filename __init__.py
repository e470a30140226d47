"""Vision for a text-only language model: a frozen ViT, a Q-Former that trains, and a causal LM with LoRA.

Names are imported on first use, so that `import lorgnette` itself loads neither torch nor transformers. It raises
ImportError where what is installed is not what it needs, before anything is made of that.
"""

import importlib
from importlib.metadata import PackageNotFoundError, requires, version


__version__ = "0.1.0"

# public name -> the module that defines it
_EXPORTS = {
    "LorgnetteConfig": "configuration.configuration_lorgnette",
    "LorgnetteQFormerConfig": "configuration.configuration_lorgnette",
    "LorgnetteRetrievalConfig": "configuration.configuration_retrieval",
    "LorgnettePreTrainedModel": "modeling.modeling_base",
    "LorgnetteQFormerModel": "modeling.modeling_qformer",
    "LorgnetteModel": "modeling.modeling_headless",
    "LorgnetteForConditionalGeneration": "modeling.modeling_lorgnette",
    "LorgnetteForImageTextRetrieval": "modeling.modeling_retrieval",
    "LorgnetteProcessor": "processing.processing_lorgnette",
    "LorgnetteImageToTextPipeline": "processing.pipeline_lorgnette",
    "LorgnetteCollator": "trainer.collator",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _check_versions() -> None:
    """Compare what is installed with what pyproject.toml asks for.

    Raises:
        ImportError: a package is missing or of a version outside its range; all such are named at once.
    """
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, requires("lorgnette")):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                installed = version(requirement.name)
            except PackageNotFoundError:
                installed = None
            if installed is None or not requirement.specifier.contains(installed, prereleases=True):
                wrong.append(f"{requirement.name}{requirement.specifier} ({installed or 'nothing'} is installed)")
    if wrong:
        raise ImportError(f"lorgnette {__version__} needs {', '.join(wrong)}")


_check_versions()
