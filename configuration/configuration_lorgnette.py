"""How a model is described: `LorgnetteConfig` (ViT, Q-Former, causal LM), and of stage 1 `LorgnetteRetrievalConfig`."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .remote_code import save_remote_code


# How the Auto classes and `pipeline` find our classes in a saved folder.
AUTO_PROCESSOR = "processing_lorgnette.LorgnetteProcessor"
AUTO_MAP = {
    "AutoConfig": "configuration_lorgnette.LorgnetteConfig",
    "AutoModel": "modeling_lorgnette.LorgnetteModel",
    "AutoModelForImageTextToText": "modeling_lorgnette.LorgnetteForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_lorgnette.LorgnetteForConditionalGeneration",
    "AutoProcessor": AUTO_PROCESSOR,
}
RETRIEVAL_AUTO_MAP = {
    "AutoConfig": "configuration_lorgnette.LorgnetteRetrievalConfig",
    "AutoModel": "modeling_retrieval.LorgnetteForImageTextRetrieval",
    "AutoProcessor": AUTO_PROCESSOR,
}
CUSTOM_PIPELINES = {
    "image-to-text": {
        "impl": "pipeline_lorgnette.LorgnetteImageToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
    }
}


# What a saved folder holds, see `modeling_forms.py`.
FORMS = ("thin", "full", "merged")

# What gives a transformer its size, and far more than any has: a config may come from a stranger, and a million layers
# take hours to be built, before anybody looks whether there are weights for them.
SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**24,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 2**16,
    "intermediate_size": 2**24,
}
MAX_QUERY_TOKENS = 2**16  # a processor writes as many placeholders an image, before any model is asked


def from_package(module: str, what: str) -> ModuleType:
    """The module of the installed package to which code that travels with a model hands over.

    Raises:
        ImportError: lorgnette is not installed; the message names `what`.
    """
    try:
        return importlib.import_module(f"lorgnette.{module}")  # by name: transformers' scanner must not ask for it
    except ModuleNotFoundError as error:
        if (error.name or "lorgnette").partition(".")[0] != "lorgnette":
            raise
        raise ImportError(f"{what} needs the package: pip install lorgnette") from error


@strict
class LorgnetteQFormerConfig(PreTrainedConfig):
    """A Q-Former: the fields of `transformers.Blip2QFormerConfig`, and the number of its learned queries.

    Args:
        encoder_hidden_size: width of the image features that cross-attention reads. Left out, it follows the ViT.
        num_query_tokens: learned queries. Left out, it follows [`LorgnetteConfig`]; a Q-Former that stands alone
            without it owns no queries and is given `query_embeds`, as `transformers.Blip2QFormerModel` is.
        cross_attention_frequency: layers 0, f, 2f, … have cross-attention.
        use_qformer_text_input: whether there is a text half (embeddings and text feed-forward), for stage 1 and for
            instructions as InstructBLIP has them.
        dec_token_id: id of `[DEC]`, with which a text begins that is to be generated (stage 1, ITG).

    Raises:
        ValueError: two fields contradict each other, or one is out of its range.
    """

    model_type = "lorgnette_qformer"
    base_config_key = "qformer_config"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    cross_attention_frequency: int = 2
    encoder_hidden_size: int | None = None
    use_qformer_text_input: bool = False
    num_query_tokens: int | None = None
    dec_token_id: int | None = None

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        for field in (*SIZES, "max_position_embeddings", "cross_attention_frequency"):
            _require_size(self, field)
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it is a share, at least 0 and below 1")
        for field in ("encoder_hidden_size", "num_query_tokens"):
            if getattr(self, field) is not None:
                _require_size(self, field)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.dec_token_id is not None and not 0 <= self.dec_token_id < self.vocab_size:
            raise ValueError(f"dec_token_id ({self.dec_token_id}) is outside the vocabulary ({self.vocab_size})")


@strict
class LorgnetteBridgeConfig(PreTrainedConfig):
    """A frozen ViT and the Q-Former that reads it: what the configs of both stages have in common.

    Args:
        vision_config: any ViT's config, or its dict with `model_type`.
        qformer_config: [`LorgnetteQFormerConfig`] or a dict of its fields.
        num_query_tokens: learned queries, and so visual tokens per picture; the one place where this count is kept.
        vision_feature_layer: index into the ViT's `hidden_states` (-2 is the penultimate layer, which BLIP-2 and LLaVA
            train on). By default it is the ViT's `last_hidden_state`, which most pass through a final LayerNorm.
        vision_feature_select_strategy: `"full"` takes all tokens (CLS, registers, patches), `"default"` the patches
            alone. The two words are transformers' own (`LlavaConfig`).
        vision_backbone, qformer_backbone: Hub ids the weights came from, where they came from the Hub.
        vision_backbone_revision, qformer_backbone_revision: their commits.
        saved_form: what the folder holds that this config was saved in: `"thin"` is all but the backbones, `"full"`
            everything, `"merged"` everything with LoRA folded into the language model; None before the first save.

    Raises:
        ValueError: two fields contradict each other, or one is out of its range.
    """

    _auto_map = AUTO_MAP

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    vision_feature_layer: int | None = None
    vision_feature_select_strategy: str = "full"
    vision_backbone: str | None = None
    vision_backbone_revision: str | None = None
    qformer_backbone: str | None = None
    qformer_backbone_revision: str | None = None
    saved_form: str | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any):
        self.vision_config = _sub_config(self.vision_config, "vision_config", default="vit")
        if not hasattr(self.vision_config, "patch_size"):
            raise ValueError(
                f'vision_config.model_type "{self.vision_config.model_type}" has no patch_size: a wrong kind'
            )
        if self.qformer_config is None:
            self.qformer_config = LorgnetteQFormerConfig()
        elif isinstance(self.qformer_config, dict):
            self.qformer_config = LorgnetteQFormerConfig(**self.qformer_config)

        for name in self.sub_configs:
            for field in SIZES:
                if isinstance(getattr(getattr(self, name), field, None), int):  # some have one for each layer
                    _require_size(getattr(self, name), field, f"{name}.")
        _require_size(self, "num_query_tokens")
        self._follow("encoder_hidden_size", self.vision_config.hidden_size, "vision_config.hidden_size")
        self._follow("num_query_tokens", self.num_query_tokens, "num_query_tokens")

        layers = self.vision_config.num_hidden_layers
        if self.vision_feature_layer is not None and not -layers - 1 <= self.vision_feature_layer <= layers:
            raise ValueError(
                f"vision_feature_layer ({self.vision_feature_layer}) is outside the ViT's {layers + 1} hidden states "
                f"(vision_config.num_hidden_layers is {layers})"
            )
        if self.vision_feature_select_strategy not in ("full", "default"):
            raise ValueError(
                f'vision_feature_select_strategy is "{self.vision_feature_select_strategy}"; it takes "full" (all '
                'tokens) or "default" (patches alone)'
            )
        if self.saved_form not in (None, *FORMS):
            raise ValueError(f"saved_form is {self.saved_form!r}; it takes {', '.join(FORMS)}")
        if self.saved_form == "thin":
            for name in ("vision_backbone", "text_backbone"):
                for field in (name, f"{name}_revision"):
                    if getattr(self, field, "") is None:
                        raise ValueError(f'saved_form is "thin", and {field} does not say what was left out')
        kwargs.setdefault("auto_map", dict(self._auto_map))
        parts = [getattr(self, name) for name in self.sub_configs]
        attention_of_parts = [part._attn_implementation for part in parts]
        super().__post_init__(**kwargs)
        if kwargs.get("attn_implementation") is None:
            # transformers resets it in every sub-config, and the backbones that are joined may be loaded models
            for part, attention in zip(parts, attention_of_parts, strict=True):
                part._attn_implementation = attention

    def _follow(self, field: str, value: int, source: str) -> None:
        """Set a field of the Q-Former that another part of this config decides."""
        given = getattr(self.qformer_config, field)
        if given is not None and given != value:
            raise ValueError(f"qformer_config.{field} ({given}) contradicts {source} ({value})")
        setattr(self.qformer_config, field, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LorgnetteBridgeConfig":
        """As `PreTrainedConfig.from_dict`; raises a ValueError for the config of another architecture."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f'This is a "{model_type}" checkpoint, not a "{cls.model_type}" one')
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As `PreTrainedConfig.save_pretrained`, with the source files that load the folder as remote code."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.auto_map = dict(self._auto_map)
        save_remote_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)


@strict
class LorgnetteConfig(LorgnetteBridgeConfig):
    """Everything that is needed to build the model again: three sub-configs and the joints between them.

    Follows the composite configs of transformers 5 (`models/blip_2/configuration_blip_2.py`). It has the fields of
    [`LorgnetteBridgeConfig`] besides its own.

    Args:
        text_config: any causal LM's config, or its dict with `model_type`.
        image_token_id: id of the `<image>` placeholder: of a token that the tokenizer keeps free, or the next free one.
            The table of embeddings is never resized, since placeholders are swapped out before the look-up.
        image_token_in_table: whether that id is inside the language model's table. It follows from the id; vLLM, say,
            serves no model where it is not.
        lora_config: fields of `peft.LoraConfig`, or `None` for a language model without LoRA.
        text_backbone, text_backbone_revision: Hub id and commit the LM came from, where it came from the Hub.

    Raises:
        ValueError: two fields contradict each other, or one is out of its range.
    """

    model_type = "lorgnette"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "image_hidden_states", "image_outputs"]  # noqa: RUF012
    sub_configs = {  # noqa: RUF012 (transformers' own class attribute)
        "vision_config": AutoConfig,
        "qformer_config": LorgnetteQFormerConfig,
        "text_config": AutoConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    image_token_in_table: bool | None = None
    lora_config: dict | None = None
    text_backbone: str | None = None
    text_backbone_revision: str | None = None

    def __post_init__(self, **kwargs: Any):
        self.text_config = _sub_config(self.text_config, "text_config", default="llama")
        if not hasattr(self.text_config, "vocab_size"):
            raise ValueError(f'text_config.model_type "{self.text_config.model_type}" has no vocab_size: a wrong kind')
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size
        self._check_image_token_id()
        self.image_token_in_table = self.image_token_id < self.text_config.vocab_size
        if self.text_config.is_encoder_decoder:
            raise ValueError(
                f'text_config.model_type "{self.text_config.model_type}" is an encoder-decoder; a causal LM is needed'
            )
        kwargs.setdefault("custom_pipelines", CUSTOM_PIPELINES)
        super().__post_init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """The language model's, for code that is generic over causal LMs and asks the top config."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.vocab_size = value

    def _check_image_token_id(self) -> None:
        if not 0 <= self.image_token_id < 2**31:
            raise ValueError(f"image_token_id is {self.image_token_id}; it has to be a free id of the tokenizer")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            taken = getattr(self.text_config, name, None)
            if self.image_token_id in (taken if isinstance(taken, list) else [taken]):
                raise ValueError(f"image_token_id ({self.image_token_id}) is also text_config.{name}")


@strict
class LorgnetteRetrievalConfig(LorgnetteBridgeConfig):
    """Stage 1: a ViT and a Q-Former with a text half, and the losses that align picture and text (BLIP-2, section 3.1).

    It has the fields of [`LorgnetteBridgeConfig`] besides its own.

    Args:
        itc_weight, itm_weight, itg_weight: of image-text contrast, matching and image-grounded generation in the loss.
            What serves only losses of weight 0 is not built.
        image_text_hidden_size: width of the space in which pictures and texts are compared (`Blip2Config` has it).

    Raises:
        ValueError: a weight below 0, no weight above 0, a Q-Former without a text half, `[DEC]` missing.
    """

    model_type = "lorgnette_retrieval"
    sub_configs = {  # noqa: RUF012 (transformers' own class attribute)
        "vision_config": AutoConfig,
        "qformer_config": LorgnetteQFormerConfig,
    }
    _auto_map = RETRIEVAL_AUTO_MAP

    itc_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    itg_weight: float | int = 1.0
    image_text_hidden_size: int = 256

    def __post_init__(self, **kwargs: Any):
        if self.qformer_config is None:
            self.qformer_config = LorgnetteQFormerConfig(use_qformer_text_input=True)
            self.qformer_config.dec_token_id = self.qformer_config.vocab_size - 1
        super().__post_init__(**kwargs)
        self.pad_token_id = self.qformer_config.pad_token_id  # where Trainer looks for it, and would otherwise warn
        _require_size(self, "image_text_hidden_size")
        weights = {name: getattr(self, name) for name in ("itc_weight", "itm_weight", "itg_weight")}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} is {weight}; it has to be at least 0")
        if not any(weights.values()):
            raise ValueError("itc_weight, itm_weight and itg_weight are all 0: there is no loss left")
        if not self.qformer_config.use_qformer_text_input:
            raise ValueError("qformer_config.use_qformer_text_input is False: stage 1 needs the text half")
        if self.itg_weight and self.qformer_config.dec_token_id is None:
            raise ValueError(
                "itg_weight is above 0 and qformer_config.dec_token_id is not set: generation starts there"
            )


def _sub_config(config: dict | PreTrainedConfig | None, name: str, default: str) -> PreTrainedConfig:
    if config is None:
        return AutoConfig.for_model(default)
    if isinstance(config, PreTrainedConfig):
        return config
    if "model_type" not in config:
        raise ValueError(f"{name} has no model_type, so its architecture is unknown; it has {sorted(config)}")
    fields = dict(config)
    model_type = fields.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # each class refuses what it does in its own way
        raise ValueError(f'{name} is no config of the model_type "{model_type}": {error}') from error


def _require_size(config: PreTrainedConfig, field: str, where: str = "") -> None:
    limits = SIZES | {"num_query_tokens": MAX_QUERY_TOKENS}
    value, largest = getattr(config, field), limits.get(field, 2**24)
    if value < 1:
        raise ValueError(f"{where}{field} is {value}; it has to be at least 1")
    if value > largest:
        raise ValueError(f"{where}{field} is {value}; more than {largest} cannot be meant")


__all__ = [
    "AUTO_MAP",
    "AUTO_PROCESSOR",
    "CUSTOM_PIPELINES",
    "FORMS",
    "MAX_QUERY_TOKENS",
    "SIZES",
    "LorgnetteBridgeConfig",
    "LorgnetteConfig",
    "LorgnetteQFormerConfig",
    "LorgnetteRetrievalConfig",
    "from_package",
]
