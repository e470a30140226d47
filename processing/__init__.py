"""Pictures and words to tensors and back: the processor, its prompts, and the pipeline."""

from transformers import AutoProcessor

from ..configuration import LorgnetteConfig, LorgnetteRetrievalConfig
from .processing_lorgnette import LorgnetteProcessor


AutoProcessor.register(LorgnetteConfig, LorgnetteProcessor)
AutoProcessor.register(LorgnetteRetrievalConfig, LorgnetteProcessor)
