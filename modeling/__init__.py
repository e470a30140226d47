"""The Q-Former, the language model's LoRA, and the model that joins them to a frozen ViT."""

from transformers import AutoModel, AutoModelForImageTextToText

from ..configuration import LorgnetteConfig
from .modeling_lorgnette import LorgnetteForConditionalGeneration


AutoModel.register(LorgnetteConfig, LorgnetteForConditionalGeneration)
AutoModelForImageTextToText.register(LorgnetteConfig, LorgnetteForConditionalGeneration)
