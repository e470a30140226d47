"""The configs of a Q-Former and of the models around it; and which source files are saved with a model."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


# How the Auto classes and `pipeline` find our classes in a saved folder.
AUTO_PROCESSOR = "processing_lorgnette.LorgnetteProcessor"
AUTO_MAP = {
    "AutoConfig": "configuration_lorgnette.LorgnetteConfig",
    "AutoModel": "modeling_lorgnette.LorgnetteModel",
    "AutoModelForImageTextToText": "modeling_lorgnette.LorgnetteForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_lorgnette.LorgnetteForConditionalGeneration",
    "AutoProcessor": AUTO_PROCESSOR,
}
CUSTOM_PIPELINES = {
    "image-to-text": {"impl": "pipeline_lorgnette.LorgnetteImageToTextPipeline", "pt": ["AutoModelForImageTextToText"]}
}
# False in a copy of this file that transformers has loaded as remote code from a saved folder
IN_PACKAGE = __name__.startswith("lorgnette.")
SAVE_FORMATS = ("thin", "full", "merged")  # what a saved folder holds, see `modeling_saving.py`

_COMMON_CODE = (
    *("configuration_lorgnette", "modeling_base", "modeling_checks", "modeling_loading", "modeling_loss"),
    *("modeling_qformer", "modeling_saving", "processing_lorgnette", "prompt_encoding", "image_loading"),
)
# model type -> the modules that are saved with such a model
CODE = {
    "lorgnette": (*_COMMON_CODE, "modeling_headless", "modeling_lorgnette", "modeling_lora", "pipeline_lorgnette"),
    "lorgnette_retrieval": (*_COMMON_CODE, "configuration_retrieval", "modeling_contrastive", "modeling_retrieval"),
}
_RELATIVE_IMPORT = re.compile(r"^(\s*)from \.+(?:\w+\.)*(\w+) import", flags=re.MULTILINE)

# what gives a transformer its size
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def save_code(folder: str | Path, model_type: str) -> None:
    """Write the source files of a kind of model into `folder`: flat, as transformers loads remote code.

    Remote code writes the files that transformers has copied beside it; a model's save adds the rest.
    """
    here = Path(__file__).parent
    for name in CODE[model_type]:
        for source in here.parent.glob(f"*/{name}.py") if IN_PACKAGE else here.glob(f"{name}.py"):
            text = _RELATIVE_IMPORT.sub(r"\1from .\2 import", source.read_text(encoding="utf-8"))
            Path(folder, source.name).write_text(text, encoding="utf-8")


def from_package(module: str, what: str) -> ModuleType:
    """A module of the installed package; an ImportError that names `what` where there is none."""
    loaded = sys.modules.get(f"lorgnette.{module}")  # `torch.compile` traces no import
    if loaded is not None:
        return loaded
    try:
        return importlib.import_module(f"lorgnette.{module}")  # by name: transformers' scanner must not ask for it
    except ModuleNotFoundError as error:
        if (error.name or "lorgnette").partition(".")[0] != "lorgnette":
            raise
        raise ImportError(f"{what} needs the package lorgnette: in a clone of its repository, pip install .") from error


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
        use_pooled_features: whether queries begin and end with pooled features, see [`LorgnetteQFormerPooling`].
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
    use_pooled_features: bool = False

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        without_layers = self.use_pooled_features and self.num_hidden_layers == 0  # a bridge of pooling and an MLP
        sizes = [name for name in SIZES if not (without_layers and name == "num_hidden_layers")]
        require_sizes(self, *sizes, "max_position_embeddings", "cross_attention_frequency")
        require_sizes(self, "encoder_hidden_size", "num_query_tokens")
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it is a share, at least 0 and below 1")
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            raise ValueError(f"hidden_size ({width}) is not a multiple of num_attention_heads ({heads})")
        if self.dec_token_id is not None and not 0 <= self.dec_token_id < self.vocab_size:
            raise ValueError(f"dec_token_id ({self.dec_token_id}) is outside the vocabulary ({self.vocab_size})")


@strict
class LorgnetteBridgeConfig(PreTrainedConfig):
    """A frozen ViT and the Q-Former that reads it: the fields that the configs of both stages share.

    Args:
        vision_config: any ViT's config, or its dict with `model_type`.
        qformer_config: [`LorgnetteQFormerConfig`] or a dict of its fields.
        num_query_tokens: learned queries, which is the number of visual tokens per picture.
        elastic_queries: whether the first m queries were learned as well, for any m: `num_query_tokens` may be fewer.
        vision_feature_layer: index into the ViT's `hidden_states` (-2 is the penultimate layer, which BLIP-2 and LLaVA
            train on). By default it is the ViT's `last_hidden_state`, which most pass through a final LayerNorm.
        vision_feature_select_strategy: as in `LlavaConfig`: `"full"` for all tokens (CLS, registers, patches),
            `"default"` for the patches alone.
        vision_backbone, qformer_backbone: Hub ids of the weights, where they came from there, with `…_revision`. A
            checkpoint of training names a local folder, with the fingerprint of its files.
        saved_form: the save format of the folder: `"thin"` is without the backbones, `"full"` is everything,
            `"merged"` is everything with LoRA merged into the language model; None before the first save.

    Raises:
        ValueError: two fields contradict each other, or one is out of its range.
    """

    _auto_map = AUTO_MAP

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    elastic_queries: bool = False
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
            kind = self.vision_config.model_type
            raise ValueError(f'vision_config.model_type "{kind}" has no patch_size: a wrong kind')
        if self.qformer_config is None:
            self.qformer_config = LorgnetteQFormerConfig()
        elif isinstance(self.qformer_config, dict):
            self.qformer_config = LorgnetteQFormerConfig(**self.qformer_config)

        for name in self.sub_configs.keys() - {"qformer_config"}:  # which has checked itself
            require_sizes(getattr(self, name), *SIZES, part=f"{name}.")
        require_sizes(self, "num_query_tokens")
        self._follow("encoder_hidden_size", self.vision_config.hidden_size, "vision_config.hidden_size")
        self.qformer_config.num_query_tokens = self.qformer_config.num_query_tokens or self.num_query_tokens
        self.query_count()

        layer, layers = self.vision_feature_layer, self.vision_config.num_hidden_layers
        if layer is not None and not -layers - 1 <= layer <= layers:
            raise ValueError(f"vision_feature_layer ({layer}) is outside the ViT's {layers + 1} hidden states")
        if self.vision_feature_select_strategy not in ("full", "default"):
            strategy = self.vision_feature_select_strategy
            raise ValueError(f'vision_feature_select_strategy is "{strategy}"; it takes "full" or "default"')
        if self.saved_form not in (None, *SAVE_FORMATS):
            raise ValueError(f"saved_form is {self.saved_form!r}; it takes {', '.join(SAVE_FORMATS)}")
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

    def query_count(self, count: int | None = None) -> int:
        """`count`, or `num_query_tokens`; a ValueError where the Q-Former has not learned with so many queries."""
        count, learned = self.num_query_tokens if count is None else count, self.qformer_config.num_query_tokens
        if count != learned and not (self.elastic_queries and 0 < count < learned):
            takes = "from 1 to that" if self.elastic_queries else "no other number (elastic_queries is False)"
            raise ValueError(f"num_query_tokens is {count}: the Q-Former has learned {learned}, and takes {takes}")
        return count

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
        """As `PreTrainedConfig.save_pretrained`, with the source files that transformers loads as remote code."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.auto_map = dict(self._auto_map)
        save_code(save_directory, self.model_type)
        super().save_pretrained(save_directory, **kwargs)


@strict
class LorgnetteConfig(LorgnetteBridgeConfig):
    """ViT, Q-Former and causal LM, as `models/blip_2/configuration_blip_2.py`: [`LorgnetteBridgeConfig`], and the LM's.

    Args:
        text_config: any causal LM's config, or its dict with `model_type`.
        image_token_id: id of the `<image>` placeholder: of a token that the tokenizer reserves, or the next free one.
            The embedding table is never resized: placeholders are replaced before the look-up.
        image_token_in_table: whether that id is inside the language model's embedding table, which vLLM requires. It
            follows from the id.
        lora_config: fields of `peft.LoraConfig`, or `None` for a language model without LoRA.
        text_backbone, text_backbone_revision: Hub id and commit of the LM, where it came from the Hub.
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
            kind = self.text_config.model_type
            raise ValueError(f'text_config.model_type "{kind}" is an encoder-decoder; a causal LM is needed')
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


def require_sizes(config: PreTrainedConfig, *fields: str, part: str = "") -> None:
    """Raise a ValueError for a field below 1; one that is not a number, or None, is not looked at."""
    for field in fields:
        value = getattr(config, field, None)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{part}{field} is {value}; it has to be at least 1")
