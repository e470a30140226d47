"""Checks of untrusted folders and repositories: the files to read, and whether the config matches them.

Only safetensors are read, and no adapter that transformers would load automatically. Shapes are compared before memory
is allocated, since transformers would initialise mismatched weights at random, however large.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from ..configuration.configuration_lorgnette import SIZES
from ..modeling.modeling_loading import WHERE, is_thin, missing_backbone, weight_files
from ..modeling.modeling_saving import BACKBONES, FINGERPRINT, is_backbone_key
from .fingerprints import folder_fingerprint


Shape = tuple[int, ...]

# A model of a million layers takes hours to build, also without memory.
_LARGEST = dict.fromkeys(SIZES, 2**24) | {"num_hidden_layers": 1_000, "num_query_tokens": 2**16}

# Fields that the weights were trained with: another value is another model, although most would load
_TRAINED_WITH = (
    "image_token_id",
    "num_query_tokens",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    *(f"{part}_backbone{of}" for part in ("vision", "text") for of in ("", "_revision")),
)
_OF_PARTS = (
    *SIZES,
    "cross_attention_frequency",
    "head_dim",
    "hidden_act",
    "image_size",
    "layer_norm_eps",
    "model_type",
)
_OF_PARTS += ("num_key_value_heads", "num_query_tokens", "patch_size", "use_qformer_text_input")
_LORA_OF_A_RUN = ("inference_mode", "init_lora_weights", "lora_dropout")  # may change for further training


# Of the load that runs: compares the model that it builds with the files, before it reads them
_CHECK_BUILT: ContextVar[Callable[[PreTrainedModel], None] | None] = ContextVar("check_built", default=None)


@contextmanager
def checked_loading(cls: type[PreTrainedModel], name: str | Path, **kwargs: Any) -> Iterator[None]:
    """Check a folder or a Hub repository; within the block `cls.from_pretrained(name, **kwargs)` loads it.

    The shapes of a model that is built once, without memory, are compared when it is built: see [`check_built`].

    Raises:
        OSError: there is no config, there are no weights, or a backbone of a thin model cannot be found.
        ValueError: see [`safe_weight_files`], [`check_fits`] and [`check_backbone`].
    """
    where = {key: kwargs[key] for key in WHERE if key in kwargs}
    thin = is_thin(name, **kwargs)
    files = safe_weight_files(name, kwargs.get("variant"), **where)
    config, compare = check_fits(cls, name, files, thin, where, **kwargs)
    of_parts = kwargs.get("quantization_config") is not None or kwargs.get("device_map") is not None
    compares_now = of_parts or is_deepspeed_zero3_enabled()  # what is built holds loaded or sharded weights
    if compares_now:
        compare(None)
    hub = {key: value for key, value in where.items() if key not in ("revision", "subfolder")}
    for part in cls.backbones if thin else ():
        check_backbone(part, config, name, hub)
    token = _CHECK_BUILT.set(None if compares_now else compare)
    try:
        yield
    except (ValueError, ImportError):
        raise
    except Exception:
        compare(None)  # where a wrong config is the reason, its error is the better one
        raise
    finally:
        _CHECK_BUILT.reset(token)


def check_built(model: PreTrainedModel) -> None:
    """Compare a model that [`checked_loading`] has built, and not yet filled, with the files; raises what that does."""
    if (compare := _CHECK_BUILT.get()) is not None:
        _CHECK_BUILT.set(None)
        compare(model)


def safe_weight_files(name: str | Path, variant: str | None = None, **where: Any) -> list[str]:
    """[`~modeling_loading.weight_files`] of a folder or a Hub repository that holds nothing else that would be loaded.

    Raises:
        OSError: no weights are there.
        ValueError: there are only pickled ones; the index names another kind of file, or one elsewhere; an adapter lies
            beside them, which transformers would put on.
    """
    have = partial(cached_file, name, _raise_exceptions_for_missing_entries=False, **where)
    if have(ADAPTER_CONFIG_NAME) is not None:
        raise ValueError(
            f"{name} has an {ADAPTER_CONFIG_NAME} beside its weights: no model is saved so here. A language model's "
            "LoRA lies in the folder lm_adapter"
        )
    if have(_variant_of(SAFE_WEIGHTS_NAME, variant)) is None:
        index = have(_variant_of(SAFE_WEIGHTS_INDEX_NAME, variant))
        pickled = [kind for kind in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if have(_variant_of(kind, variant)) is not None]
        if index is None and pickled:
            raise ValueError(
                f"{name} holds {pickled[0]} and no {SAFE_WEIGHTS_NAME}: pickled weights are not read. Whoever trusts "
                "them loads them with torch, and saves the model with save_pretrained"
            )
        shards = {} if index is None else json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        if odd := sorted(shard for shard in set(shards.values()) if not re.fullmatch(r"[\w.-]+\.safetensors", shard)):
            raise ValueError(f"{name}: its index names {odd[0]!r}, which is no safetensors file beside it")
    return weight_files(name, variant, **where)


def check_fits(
    cls: type[PreTrainedModel], name: str | Path, files: list[str], thin: bool, where: dict[str, Any], **kwargs: Any
) -> tuple[PreTrainedConfig, Callable[[PreTrainedModel | None], None]]:
    """A model's config, compared with the one beside the files; and what compares a model of it with their shapes.

    The latter is given a model of this config, or None: then it builds one without memory.

    Args:
        cls: the class that is to be loaded.
        files: from [`safe_weight_files`].
        thin: whether the backbones are not in them.
        where: as in [`safe_weight_files`].
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: the config describes a part of a size that no model has, names other files, or contradicts the
            config that lies beside them, with both values. When a model is compared: none can be built of the config; a
            tensor has another shape in the files, with both; or they hold less than half of the model's numbers.
    """
    config = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        config, _ = cls.config_class.from_pretrained(config or name, return_unused_kwargs=True, **kwargs)
    if elsewhere := getattr(config, "transformers_weights", None):
        raise ValueError(
            f"{name}: its config says that the weights are in {elsewhere!r}, and no model is saved so here"
        )
    if kwargs.get("ignore_mismatched_sizes"):
        return config, lambda _: None
    _check_overrides(name, config, where)
    _check_sizes(name, config)
    return config, partial(_compare_shapes, cls, name, files, thin, copy.deepcopy(config))


def _compare_shapes(
    cls: type[PreTrainedModel],
    name: str | Path,
    files: list[str],
    thin: bool,
    config: PreTrainedConfig,
    model: PreTrainedModel | None,
) -> None:
    """See [`check_fits`]."""
    found = {key: shape for file in files for key, shape in _shapes_in(file).items()}
    described = _shapes_of(model or _skeleton(cls, name, config))
    if thin:
        described = {key: shape for key, shape in described.items() if not is_backbone_key(cls, key)}
    for key in sorted(found.keys() & described.keys()):
        if found[key] != described[key]:
            raise ValueError(f"{name}: {key} is {found[key]} in the files, and {described[key]} by the config")
    # names may differ (transformers keeps older ones in files), and some weights may be absent that nothing reads
    room, needed = (sum(math.prod(shape) for shape in shapes.values()) for shapes in (found, described))
    if needed > 2 * room:
        lacking = sorted(key for key in described.keys() - found.keys() if is_backbone_key(cls, key))
        what = f" lacks {len(lacking)} weights of its backbones ({lacking[0]}, …)" if lacking else ""
        raise ValueError(f"{name}{what}: its config describes {needed:,} numbers, and the files hold {room:,}")


def check_backbone(part: str, config: PreTrainedConfig, name: str | Path, hub: dict[str, Any]) -> None:
    """Check a thin model's backbone: its files, and whether it matches the model's config.

    Raises:
        OSError: it cannot be found; says what to do.
        ValueError: see [`safe_weight_files`]; its folder has changed; or a field of its config is another, with both
            values.
    """
    what, prefix = BACKBONES[part]
    source, revision = getattr(config, f"{prefix}_backbone"), getattr(config, f"{prefix}_backbone_revision")
    try:
        own = AutoConfig.from_pretrained(source, revision=revision, **hub)
        safe_weight_files(source, revision=revision, **hub)
    except OSError as error:
        raise OSError(missing_backbone(name, what, source, revision, error)) from error
    if revision.startswith(FINGERPRINT) and (found := folder_fingerprint(source)) != revision:
        raise ValueError(
            f"{name} was trained on the {what} in the folder {source}, which has changed: its fingerprint was "
            f"{revision} and is {found}. Put the files back that it was trained on"
        )
    own, described = getattr(own, f"{prefix}_config", own), getattr(config, f"{prefix}_config")
    for field in (*SIZES, "head_dim", "image_size", "num_key_value_heads", "patch_size"):
        expected, found = field_of(described, field), field_of(own, field)
        if expected != found:
            raise ValueError(f"{name}: its {what} {source} has {field} {found}, and not {expected}, as the config says")


def _check_overrides(name: str | Path, config: PreTrainedConfig, where: dict[str, Any]) -> None:
    """Raise a ValueError for the first field in which a config differs from the one beside the weights."""
    try:
        beside = PreTrainedConfig.get_config_dict(name, **where)[0]
    except OSError:
        beside = {}
    if "model_type" not in beside:  # weights alone
        return
    own = type(config).from_dict(beside)
    fields = [("", own, config, _TRAINED_WITH)]
    fields += [(f"{part}.", getattr(own, part), getattr(config, part), _OF_PARTS) for part in own.sub_configs]
    lora = [getattr(each, "lora_config", None) for each in (own, config)]
    if None in lora and lora[0] != lora[1]:
        fields.append(("", own, config, ("lora_config",)))
    elif lora[0] is not None:
        rank = [SimpleNamespace(**{key: each.get(key) for key in {**lora[0], **lora[1]}}) for each in lora]
        fields.append(("lora_config.", *rank, sorted(vars(rank[0]).keys() - set(_LORA_OF_A_RUN))))
    for prefix, saved, asked, names in fields:
        for field in names:
            trained, requested = field_of(saved, field), field_of(asked, field)
            if own.elastic_queries and prefix == "" and field == "num_query_tokens":
                continue  # the model checks it
            if trained != requested and not ("backbone" in field and requested is None):  # which the folder says
                raise ValueError(
                    f"{name}: {prefix}{field} is {trained!r} in its config, with which its weights were trained, and "
                    f"{requested!r} was asked for: leave it out, or build such a model with from_backbones"
                )
    for weight in ("itc_weight", "itm_weight"):
        if not getattr(own, weight, 1) and getattr(config, weight):
            asked = getattr(config, weight)
            raise ValueError(
                f"{name}: {weight} is 0 in its config, and so its weights are not there; {asked} was asked"
            )


def field_of(config: Any, field: str) -> Any:
    """The value of a config's field: a list where the layers have one each (Gemma 4), and None where it has none."""
    try:
        return getattr(config, field, None)
    except RuntimeError:  # transformers has no one value for all
        return [getattr(each, field, None) for each in config.per_layer_config]


def _shapes_in(file: str) -> dict[str, Shape]:
    with safe_open(file, framework="pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 (no mapping)


def _check_sizes(name: str | Path, config: PreTrainedConfig) -> None:
    """Raises a ValueError for a part of a size that no model has."""
    for part in config.sub_configs:
        for field, largest in _LARGEST.items():
            value = field_of(getattr(config, part), field)
            if isinstance(value, int) and value > largest:
                raise ValueError(f"{name}: {part}.{field} is {value}; the limit is {largest}")


def _shapes_of(model: PreTrainedModel) -> dict[str, Shape]:
    """The parameters of a model; one that transformers is loading has not tied any yet, and so has names for each."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {key: tuple(value.shape) for key, value in model.named_parameters() if key not in tied}


def _skeleton(cls: type[PreTrainedModel], name: str | Path, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this config without memory; a ValueError where none can be built."""
    try:
        with torch.device("meta"), no_init_weights():
            return cls(copy.deepcopy(config))
    except (ValueError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{name}: no model can be built of its config: {error or type(error).__name__}") from error


def _variant_of(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


__all__ = ["check_backbone", "check_built", "check_fits", "checked_loading", "safe_weight_files"]
