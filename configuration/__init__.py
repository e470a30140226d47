"""The configs of the models."""

from transformers import AutoConfig

from .configuration_lorgnette import LorgnetteConfig, LorgnetteQFormerConfig
from .configuration_retrieval import LorgnetteRetrievalConfig


# Where lorgnette is imported, saved folders load through its classes, and transformers asks nothing about remote code.
AutoConfig.register(LorgnetteConfig.model_type, LorgnetteConfig)
AutoConfig.register(LorgnetteQFormerConfig.model_type, LorgnetteQFormerConfig)
AutoConfig.register(LorgnetteRetrievalConfig.model_type, LorgnetteRetrievalConfig)
