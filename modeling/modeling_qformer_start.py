"""What the Q-Former of stage 2 starts from: nothing, a BERT, or the Q-Former that stage 1 has taught to see."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..assembly.sources import from_pretrained_arguments
from ..configuration.configuration_lorgnette import LorgnetteRetrievalConfig
from .modeling_backbones import Backbone, is_unread, load_bert, qformer_fields
from .modeling_qformer import LorgnetteQFormerModel
from .modeling_retrieval import LorgnetteForImageTextRetrieval


# What stage 1 has settled besides the Q-Former's own fields, and what it is where nobody says anything.
_SETTLED = {"num_query_tokens": 32, "vision_feature_layer": None, "vision_feature_select_strategy": "full"}


@dataclass
class QFormerStart:
    """A Q-Former's start, and what follows from it for the model it goes into.

    Args:
        backbone: a BERT, a [`LorgnetteForImageTextRetrieval`], or None for random numbers.
    """

    backbone: Backbone | None = None

    @classmethod
    def load(cls, source: str | Path | PreTrainedModel | None, revision: str | None) -> "QFormerStart":
        """A BERT or a stage-1 model: a Hub id, a local folder or a loaded model."""
        if source is None:
            return cls()
        if isinstance(source, LorgnetteForImageTextRetrieval):
            return cls(Backbone(source))
        if isinstance(source, (str, Path)) and is_stage1(source, revision):
            return cls(Backbone(LorgnetteForImageTextRetrieval.from_pretrained(source, revision=revision)))
        return cls(load_bert(source, revision))

    @property
    def stage1(self) -> LorgnetteForImageTextRetrieval | None:
        """The stage-1 model, where it is one."""
        model = self.backbone.model if self.backbone else None
        return model if isinstance(model, LorgnetteForImageTextRetrieval) else None

    @property
    def name(self) -> str | None:
        """Hub id of the BERT, of the stage-1 model's BERT where it is one."""
        return self.stage1.config.qformer_backbone if self.stage1 else self.backbone and self.backbone.name

    @property
    def revision(self) -> str | None:
        """The commit that belongs to `name`."""
        return self.stage1.config.qformer_backbone_revision if self.stage1 else self.backbone and self.backbone.revision

    def fields(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """Fields of [`LorgnetteQFormerConfig`]; the text half of stage 1 is left out unless `given` asks for it.

        Raises:
            ValueError: a given field that the config does not know, or one that stage 1 has settled otherwise.
        """
        if self.stage1 is None:
            return qformer_fields(self.backbone, given)
        given, theirs = qformer_fields(None, given), self.stage1.config.qformer_config
        for name in given.keys() - {"use_qformer_text_input", *_FREE}:
            settled = getattr(theirs, name)
            if given[name] != settled:
                raise ValueError(f"qformer_config.{name} is {given[name]!r}; the stage-1 Q-Former's is {settled!r}")
        return theirs.to_diff_dict() | {"use_qformer_text_input": False} | given

    def settle(self, processor: Any, **wished: Any) -> dict[str, Any]:
        """`num_query_tokens`, `vision_feature_layer` and `vision_feature_select_strategy` of the model.

        Args:
            processor: the model's, or None; it decides the number of queries where nothing else does.
            wished: the three, as the caller gave them or at their defaults (None for `num_query_tokens`).

        Raises:
            ValueError: stage 1 learned with another value than the one that is wished.
        """
        if self.stage1 is None:
            default = processor.num_query_tokens if processor is not None else _SETTLED["num_query_tokens"]
            queries = wished["num_query_tokens"]
            return wished | {"num_query_tokens": default if queries is None else queries}
        settled = {name: getattr(self.stage1.config, name) for name in _SETTLED}
        for name, value in settled.items():
            said = wished[name] is not None and (name == "num_query_tokens" or wished[name] != _SETTLED[name])
            if said and wished[name] != value:
                raise ValueError(f"{name} is {wished[name]!r}; the stage-1 Q-Former has learned with {value!r}")
        return settled

    def check_vision(self, vision_model: PreTrainedModel) -> None:
        """See to it that stage 1 has learned to read this very ViT, in the coarser of both dtypes.

        Raises:
            ValueError: it has not; names the first tensor that differs.
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
            ValueError: a BERT that does not fit, see [`LorgnetteQFormerModel.load_bert`].
        """
        if self.stage1 is not None:
            own = qformer.state_dict()
            qformer.load_state_dict({name: self.stage1.qformer.state_dict()[name] for name in own})
        elif self.backbone is not None:
            qformer.load_bert(self.backbone.model)


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are the same, but for the rounding of the dtype that rounds more."""
    dtypes = {first.dtype, second.dtype}
    coarser = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps) if len(dtypes) > 1 else first.dtype
    return torch.equal(first.to(second.device, coarser), second.to(coarser))


def is_stage1(source: str | Path, revision: str | None = None) -> bool:
    """Whether a Hub id or a folder is a stage-1 model's."""
    name, keywords = from_pretrained_arguments(source, revision)
    config, _ = PreTrainedConfig.get_config_dict(name, **keywords)
    return config.get("model_type") == LorgnetteRetrievalConfig.model_type


# What a Q-Former may change between the stages: it shapes no weight.
_FREE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")


__all__ = ["QFormerStart", "is_stage1"]
