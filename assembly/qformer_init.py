"""Initialise a Q-Former: at random, from a BERT, from a stage-1 model, or from a BLIP-2 checkpoint."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_lorgnette import LorgnetteQFormerConfig
from ..configuration.configuration_retrieval import LorgnetteRetrievalConfig
from ..modeling.modeling_loading import is_unread
from ..modeling.modeling_qformer import LorgnetteQFormerModel
from ..modeling.modeling_retrieval import LorgnetteForImageTextRetrieval
from .backbones import Backbone, load_bert
from .blip2_qformer import is_blip2, load_blip2_qformer
from .sources import model_type_of


logger = logging.get_logger(__name__)


# Fields that stage 1 fixes besides the Q-Former's own, and their defaults.
FIXED_FIELDS = {"num_query_tokens": 32, "vision_feature_layer": None, "vision_feature_select_strategy": "full"}


@dataclass
class QFormerInit:
    """The source of a Q-Former's initial weights, and the config fields that follow from it.

    Args:
        backbone: a BERT, a [`LorgnetteForImageTextRetrieval`], the [`LorgnetteQFormerModel`] of a BLIP-2 checkpoint,
            or None for random numbers.
    """

    backbone: Backbone | None = None

    @classmethod
    def load(cls, source: str | Path | PreTrainedModel | None, revision: str | None) -> "QFormerInit":
        """A BERT, a stage-1 model or a BLIP-2: a Hub id, a local folder or a loaded model."""
        if source is None:
            return cls()
        if is_blip2(source, revision):
            return cls(load_blip2_qformer(source, revision))
        if isinstance(source, LorgnetteForImageTextRetrieval):
            return cls(Backbone(source))
        if isinstance(source, (str, Path)) and is_stage1(source, revision):
            return cls(Backbone(LorgnetteForImageTextRetrieval.from_pretrained(source, revision=revision)))
        return cls(load_bert(source, revision))

    @property
    def stage1(self) -> LorgnetteForImageTextRetrieval | None:
        """The stage-1 model, or None."""
        model = self.backbone.model if self.backbone else None
        return model if isinstance(model, LorgnetteForImageTextRetrieval) else None

    @property
    def pretrained(self) -> LorgnetteQFormerModel | None:
        """The Q-Former of a BLIP-2 checkpoint, or None."""
        model = self.backbone.model if self.backbone else None
        return model if isinstance(model, LorgnetteQFormerModel) else None

    @property
    def name(self) -> str | None:
        """Hub id of the BERT, or of the stage-1 model's BERT."""
        return self.stage1.config.qformer_backbone if self.stage1 else self.backbone and self.backbone.name

    @property
    def revision(self) -> str | None:
        """The commit that belongs to `name`."""
        return self.stage1.config.qformer_backbone_revision if self.stage1 else self.backbone and self.backbone.revision

    def fields(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """Fields of [`LorgnetteQFormerConfig`]; a trained text half is left out unless `given` asks for it.

        Raises:
            ValueError: a given field that the config does not know, or one that training has fixed otherwise.
        """
        if self.stage1 is None and self.pretrained is None:
            return qformer_fields(self.backbone, given)
        theirs = self.stage1.config.qformer_config if self.stage1 else self.pretrained.config
        given, what = qformer_fields(None, given), "stage-1" if self.stage1 else "BLIP-2"
        for name in given.keys() - {"use_qformer_text_input", *MUTABLE_FIELDS}:
            fixed = getattr(theirs, name)
            if given[name] != fixed:
                raise ValueError(f"qformer_config.{name} is {given[name]!r}; the {what} Q-Former's is {fixed!r}")
        fields = theirs.to_diff_dict()
        if self.pretrained is not None:
            del fields["encoder_hidden_size"]  # of BLIP-2's ViT: another one may be read
            if given.get("use_qformer_text_input") and not theirs.use_qformer_text_input:
                raise ValueError("use_qformer_text_input is set, and the BLIP-2 Q-Former has no text half")
        return fields | {"use_qformer_text_input": False} | given

    def resolve_fields(self, processor: Any, **given: Any) -> dict[str, Any]:
        """`num_query_tokens`, `vision_feature_layer` and `vision_feature_select_strategy` of the model.

        Args:
            processor: the model's, or None; it decides the number of queries where nothing else does.
            given: the three, as the caller gave them or at their defaults (None for `num_query_tokens`).

        Raises:
            ValueError: stage 1 or BLIP-2 was trained with another value than the given one.
        """
        if self.pretrained is not None:
            queries = self.pretrained.config.num_query_tokens
            if given["num_query_tokens"] not in (None, queries):
                raise ValueError(f"num_query_tokens is {given['num_query_tokens']}; the BLIP-2 Q-Former has {queries}")
            return given | {"num_query_tokens": queries}
        if self.stage1 is None:
            default = processor.num_query_tokens if processor is not None else FIXED_FIELDS["num_query_tokens"]
            queries = given["num_query_tokens"]
            return given | {"num_query_tokens": default if queries is None else queries}
        fixed = {name: getattr(self.stage1.config, name) for name in FIXED_FIELDS}
        for name, value in fixed.items():
            is_given = given[name] is not None and (name == "num_query_tokens" or given[name] != FIXED_FIELDS[name])
            if is_given and given[name] != value:
                raise ValueError(f"{name} is {given[name]!r}; the stage-1 Q-Former has learned with {value!r}")
        return fixed

    def check_vision(self, vision_model: PreTrainedModel) -> None:
        """Check that stage 1 was trained on this ViT, in the coarser of both dtypes.

        Raises:
            ValueError: it was not; names the first tensor that differs.
        """
        if self.stage1 is None:
            return
        theirs = self.stage1.vision_model.state_dict()
        for name, ours in vision_model.state_dict().items():
            if not is_unread(f"vision_model.{name}") and (name not in theirs or not _equal(theirs[name], ours)):
                raise ValueError(f"The stage-1 Q-Former has learned to read another ViT: {name!r} differs")

    def load_into(self, qformer: LorgnetteQFormerModel) -> None:
        """Copy the weights.

        Raises:
            ValueError: a BERT that does not fit, see [`load_bert_weights`].
        """
        if self.stage1 is not None:
            own = qformer.state_dict()
            qformer.load_state_dict({name: self.stage1.qformer.state_dict()[name] for name in own})
        elif self.pretrained is not None:
            own, theirs = qformer.state_dict(), self.pretrained.state_dict()
            taken = {name: theirs[name] for name, tensor in own.items() if theirs[name].shape == tensor.shape}
            qformer.load_state_dict(taken, strict=False)
            fresh = _modules_of(name for name in own if name not in taken)  # keys and values of a ViT of another width
            logger.info(f"Q-Former: {len(taken)} tensors taken from BLIP-2; fresh: {fresh or 'none'}")
        elif self.backbone is not None:
            load_bert_weights(qformer, self.backbone.model)


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of the coarser dtype."""
    dtypes = {first.dtype, second.dtype}
    coarser = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps) if len(dtypes) > 1 else first.dtype
    return torch.equal(first.to(second.device, coarser), second.to(coarser))


def is_stage1(source: str | Path, revision: str | None = None) -> bool:
    """Whether a Hub id or a folder is a stage-1 model's."""
    return model_type_of(source, revision) == LorgnetteRetrievalConfig.model_type


# Fields that may change between the stages, since no weight's shape depends on them.
MUTABLE_FIELDS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")


def qformer_fields(bert: Backbone | None, given: dict[str, Any] | None) -> dict[str, Any]:
    """Fields of [`LorgnetteQFormerConfig`]: those of the BERT that the Q-Former starts from, and over them the given.

    Raises:
        ValueError: a given field that the config does not know.
    """
    given = given or {}
    unknown = sorted(given.keys() - LorgnetteQFormerConfig().to_dict().keys())
    if unknown:
        raise ValueError(f"qformer_config has fields that LorgnetteQFormerConfig does not know: {unknown}")
    theirs = {} if bert is None else bert.model.config.to_dict()
    return {name: theirs[name] for name in _FROM_BERT if name in theirs} | given


_FROM_BERT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "layer_norm_eps",
    "pad_token_id",
)


@torch.no_grad()
def load_bert_weights(qformer: LorgnetteQFormerModel, bert: PreTrainedModel) -> None:
    """Start from a BERT (BLIP-2, section 3.1): copy self-attention and feed-forward, not cross-attention.

    The query feed-forward starts as a copy of the text one. BERT's first token type, which it adds to every token,
    is added to the position embeddings. Logs what was copied, and what was not.

    Args:
        bert: a model with BERT's parameter names, at least as many layers and the same widths.

    Raises:
        ValueError: not a BERT, another shape or too few layers; names the first tensor that does not fit.
    """
    kind, source, own = bert.config.model_type, bert.base_model.state_dict(), qformer.state_dict()
    if qformer.config.use_qformer_text_input and kind != "bert":
        raise ValueError(f'The text half needs model_type "bert"; "{kind}" counts its positions in another way')
    if "embeddings.token_type_embeddings.weight" in source:
        positions = source["embeddings.position_embeddings.weight"]
        source["embeddings.position_embeddings.weight"] = (
            positions + source["embeddings.token_type_embeddings.weight"][0]
        )
    words = source.get("embeddings.word_embeddings.weight")
    if (
        qformer.config.dec_token_id is not None
        and words is not None
        and words.shape[0] == qformer.config.vocab_size - 1
    ):
        # the row of [DEC] keeps its random initial values
        drawn = own["embeddings.word_embeddings.weight"][qformer.config.dec_token_id :]
        source["embeddings.word_embeddings.weight"] = torch.cat([words, drawn.to(words)])
    taken: dict[str, torch.Tensor] = {}
    for name, tensor in own.items():
        if "crossattention" in name or name.startswith(("query_tokens", "pooling")):
            continue
        theirs = _name_in_bert(name)
        if theirs not in source:
            raise ValueError(
                f"{type(bert).__name__} has no weight {theirs!r}: the Q-Former starts from a BERT with at least "
                f"{qformer.config.num_hidden_layers} layers"
            )
        if source[theirs].shape != tensor.shape:
            raise ValueError(
                f"{type(bert).__name__}'s {theirs!r} is {tuple(source[theirs].shape)} and the Q-Former's "
                f"{name!r} is {tuple(tensor.shape)}: their configs differ"
            )
        taken[name] = source[theirs]
    qformer.load_state_dict(taken, strict=False)
    fresh = _modules_of(name for name in own if name not in taken)
    logger.info(f"Q-Former: {len(taken)} tensors taken from {type(bert).__name__}; fresh: {fresh}")


def _name_in_bert(name: str) -> str:
    """The name that `transformers.BertModel` gives to a parameter of the Q-Former."""
    if name.startswith("layernorm."):
        return name.replace("layernorm", "embeddings.LayerNorm")
    name = name.replace("attention.attention.", "attention.self.")
    return name.replace("intermediate_query.", "intermediate.").replace("output_query.", "output.")


def _modules_of(names: Iterable[str]) -> str:
    """Which modules these parameters are in, in brief: `query_tokens; crossattention of layers 0, 2, 4`."""
    modules: dict[str, set[int]] = {}
    for name in names:
        in_layer = re.search(r"\.(\d+)\.(\w+)", name)
        module, layers = (in_layer[2], {int(in_layer[1])}) if in_layer else (name.split(".")[0], set())
        modules.setdefault(module, set()).update(layers)
    return "; ".join(
        f"{module} of layers {', '.join(map(str, sorted(layers)))}" if layers else module
        for module, layers in modules.items()
    )


__all__ = ["QFormerInit", "is_stage1", "load_bert_weights", "qformer_fields"]
