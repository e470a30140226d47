"""Card metadata from a model's config: every push writes it, and `hub_upload.py` adds to it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..configuration.configuration_lorgnette import LorgnetteConfig
from ..configuration.configuration_retrieval import LorgnetteRetrievalConfig
from ..modeling.modeling_saving import FINGERPRINT


logger = logging.get_logger(__name__)

# Stage 1 scores texts for a picture, which is what that task asks for.
_TASKS = {
    LorgnetteConfig.model_type: "image-text-to-text",
    LorgnetteRetrievalConfig.model_type: "zero-shot-image-classification",
}
NO_LICENSE = (None, "", "unknown")


def card_metadata(config: PreTrainedConfig, save_format: str) -> dict[str, Any]:
    """Task, library, backbones and tags, as the Hub's cards have them.

    Args:
        save_format: of the card's folder.
    """
    backbones = list(dict.fromkeys(name for name, _ in backbones_of(config)))
    return {
        "library_name": "transformers",
        "pipeline_tag": _TASKS[config.model_type],
        "base_model": backbones or None,
        "base_model_relation": ("adapter" if save_format == "thin" else "finetune") if backbones else None,
        "tags": ["lorgnette", "q-former"],
    }


def complete_card(card: ModelCard, config: PreTrainedConfig, save_format: str) -> None:
    """Add the model's metadata to a card of transformers or of the Hub.

    An existing licence stays; a missing one becomes the one that the backbones agree on, if they do. Removes figures,
    since they belong to older weights or lack their data.
    """
    metadata = card_metadata(config, save_format)
    metadata["tags"] = list(dict.fromkeys([*(card.data.tags or ()), *metadata["tags"]]))
    if card.data.license in NO_LICENSE:
        try:
            metadata["license"] = license_of(config)
        except ValueError as error:
            logger.warning(f"The card names no licence. {error}")
    for name, value in metadata.items():
        if value is not None:
            setattr(card.data, name, value)
    card.data.eval_results = None
    card.data.pop("model_name", None)  # a field of the model-index alone


def backbones_of(config: PreTrainedConfig) -> list[tuple[str, str | None]]:
    """Hub id and commit of each part that came from the Hub."""
    found = [hub_source(config, part) for part in ("vision", "text", "qformer")]
    return [(name, revision) for name, revision in found if name]


def hub_source(config: PreTrainedConfig, part: str) -> tuple[str | None, str | None]:
    """Hub id and commit of a part; None where it came from memory or a local folder, which checkpoints name."""
    name, revision = (getattr(config, f"{part}_backbone{of}", None) for of in ("", "_revision"))
    return (None, None) if (revision or "").startswith(FINGERPRINT) else (name, revision)


def license_of(config: PreTrainedConfig) -> str:
    """The licence that the cards of the backbones agree on.

    Raises:
        ValueError: a frozen backbone did not come from the Hub, a card has no licence or one of its own, two differ.
    """
    ask = "say under which licence the model may be used (license=, --license; or in the card)"
    for part, what in (("vision", "ViT"), ("text", "language model")):
        if hasattr(config, f"{part}_config") and hub_source(config, part)[0] is None:
            raise ValueError(f"The {what} came from a folder, and its licence is not known: {ask}")
    found = {name: _license_on_hub(name, revision) for name, revision in backbones_of(config)}
    licenses = ", ".join(f"{name}: {license or 'none that is known'}" for name, license in found.items())
    if len(set(found.values())) > 1 or {*NO_LICENSE, "other"} & set(found.values()):
        raise ValueError(f"The licences of the backbones do not settle the model's ({licenses}): {ask}")
    return next(iter(found.values()))


def _license_on_hub(name: str, revision: str | None) -> str | None:
    """The licence in a repository's card, from the cache if the Hub cannot be reached; or None."""
    try:
        card = hf_hub_download(name, "README.md", revision=revision)
    except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError):
        return None
    license = ModelCard.load(Path(card), ignore_metadata_errors=True).data.license
    return license if isinstance(license, str) else None


__all__ = ["NO_LICENSE", "backbones_of", "card_metadata", "complete_card", "hub_source", "license_of"]
