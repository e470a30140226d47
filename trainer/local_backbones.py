"""Checkpoints of a run over local backbones: they hold what trains, and name each backbone's folder and fingerprint."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from transformers import PreTrainedConfig, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..assembly.fingerprints import folder_fingerprint
from ..modeling.modeling_base import LorgnettePreTrainedModel
from ..modeling.modeling_saving import BACKBONES, FINGERPRINT, keys_to_ignore_on_save, why_not_thin


logger = logging.getLogger(__name__)

# a Hub id with its commit, or a local folder with its fingerprint; None where neither is known
Source = tuple[str | None, str | None]


def local_sources(
    model: LorgnettePreTrainedModel, fingerprint: Callable[[str], str] = folder_fingerprint
) -> dict[str, Source]:
    """Folder and fingerprint of each backbone that was read from a local folder, by its name in the model.

    Args:
        fingerprint: reads the whole folder, which takes seconds for gigabytes. Not called where the model was loaded
            from a checkpoint: that has compared the fingerprint.
    """
    sources = {}
    for part in model.backbones:
        source = source_in(model.config, part)
        if is_local(source):
            sources[part] = source
        elif folder := (model._backbone_folders or {}).get(part):
            sources[part] = (folder, fingerprint(folder))
    return sources


@contextmanager
def named_in_checkpoints(
    model: LorgnettePreTrainedModel, sources: Mapping[str, Source], args: TrainingArguments
) -> Iterator[None]:
    """Within the block a save leaves local backbones out and names them, if all others came from the Hub.

    Checkpoints that Trainer pushes are in full: they have to load elsewhere. After the block, saves are in full again.

    Args:
        sources: from [`local_sources`].
    """
    pushes = args.push_to_hub and args.hub_strategy != HubStrategy.END
    if pushes and sources:
        logger.info("Checkpoints are saved in full, since they are pushed; hub_strategy: end pushes the model alone")
    if pushes or not sources:
        yield
        return
    fields = {}
    for part, (folder, fingerprint) in sources.items():
        name = f"{BACKBONES[part][1]}_backbone"
        fields |= {name: folder, f"{name}_revision": fingerprint}
    before = {field: getattr(model.config, field) for field in fields}
    ignored = model._keys_to_ignore_on_save
    try:
        model.config.update(fields)
        model._may_name_folders = True
        model._keys_to_ignore_on_save = keys_to_ignore_on_save(model)
        if why_not_thin(model, []) is None:
            parts = " and ".join(f"{BACKBONES[part][0]} ({folder})" for part, (folder, _) in sources.items())
            logger.info("Checkpoints hold what trains, without %s; the model at the end holds everything", parts)
        yield
    finally:
        model.config.update(before)
        model._may_name_folders, model._keys_to_ignore_on_save = False, ignored


def source_in(config: PreTrainedConfig | Mapping[str, str | None], part: str) -> Source:
    """The source of a backbone that a config, or its dict, names."""
    fields = config if isinstance(config, Mapping) else vars(config)
    name = f"{BACKBONES[part][1]}_backbone"
    return fields.get(name), fields.get(f"{name}_revision")


def is_local(source: Source) -> bool:
    """Whether a source is a folder with a fingerprint."""
    return (source[1] or "").startswith(FINGERPRINT)


def describe(source: Source) -> str:
    """A source in an error, after the backbone's name."""
    name, revision = source
    if None in source:
        return "of unknown origin"
    return f"in the folder {name} ({revision})" if is_local(source) else f"{name} at commit {revision}"


__all__ = ["Source", "describe", "is_local", "local_sources", "named_in_checkpoints", "source_in"]
