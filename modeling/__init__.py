"""The Q-Former, the language model's LoRA, and the models that join them to a frozen ViT."""

from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from ..configuration import LorgnetteConfig, LorgnetteRetrievalConfig
from .modeling_headless import LorgnetteModel
from .modeling_lorgnette import LorgnetteForConditionalGeneration
from .modeling_retrieval import LorgnetteForImageTextRetrieval


AutoModel.register(LorgnetteConfig, LorgnetteModel)
AutoModelForMultimodalLM.register(LorgnetteConfig, LorgnetteForConditionalGeneration)
AutoModelForImageTextToText.register(LorgnetteConfig, LorgnetteForConditionalGeneration)
AutoModel.register(LorgnetteRetrievalConfig, LorgnetteForImageTextRetrieval)
