"""Load one model with all its bridges, from folders or the Hub."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..assembly.picture_sizes import check_image_processor
from ..assembly.sources import from_pretrained_arguments
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.processing_lorgnette import LorgnetteProcessor


def load(
    model: str | Path,
    bridges: Mapping[str, str | Path],
    *,
    name: str = "default",
    revision: str | None = None,
    num_query_tokens: int | None = None,
    device: str | None = None,
) -> tuple[LorgnetteForConditionalGeneration, dict[str, LorgnetteProcessor]]:
    """Load a saved model and further bridges, each a folder or a Hub id.

    Args:
        bridges: by the names that callers use.
        name: what callers call the model's own bridge.
        revision: of `model`: branch, tag or commit.
        num_query_tokens: fewer visual tokens a picture than `model` has learned, see [`LorgnetteConfig`].
        device: an accelerator where there is one, by default.

    Returns:
        the model, in eval mode, and each bridge's processor, the model's own first.

    Raises:
        ValueError: a name twice; models that do not belong together; a processor that does not fit or makes huge ones.
        OSError: there is no such model.
    """
    if name in bridges:
        raise ValueError(f"two bridges are called {name!r}: the model's own, and {bridges[name]}")
    if LorgnetteForConditionalGeneration.active_bridge in bridges:
        raise ValueError("a bridge cannot be called 'default': the model's own is, whatever its callers say")
    folder, keywords = from_pretrained_arguments(model, revision, num_query_tokens=num_query_tokens)
    processors = {name: LorgnetteProcessor.from_pretrained(folder, **keywords)}
    loaded = LorgnetteForConditionalGeneration.from_pretrained(folder, dtype="auto", **keywords)
    for other, source in bridges.items():
        loaded.load_bridge(source, other)
        processors[other] = LorgnetteProcessor.from_pretrained(source)
    for processor in processors.values():
        loaded.check_processor(processor)
        check_image_processor(processor.image_processor, processor.max_image_pixels)
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return loaded.eval().to(device), processors
