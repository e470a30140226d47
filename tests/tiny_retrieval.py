"""A tiny model of stage 1, its processor, and a batch with two pairs of one caption."""

import torch
from tiny import bert_tokenizer, image_processor, picture
from tiny_models import NUM_QUERY_TOKENS, bert, vision_model

from lorgnette import LorgnetteForImageTextRetrieval, LorgnetteProcessor


WORDS = len(bert_tokenizer())
CAPTIONS = ["the cat", "a dog", "the picture of a cat", "the cat"]  # the first and the last are the same


def processor(**fields) -> LorgnetteProcessor:
    return LorgnetteProcessor.from_backbones(
        image_processor(), None, **{"qformer": bert_tokenizer(), "num_query_tokens": NUM_QUERY_TOKENS} | fields
    )


def retriever(seed: int = 0, **kwargs) -> LorgnetteForImageTextRetrieval:
    torch.manual_seed(seed)
    kwargs = {"qformer": bert(vocab_size=WORDS), "processor": processor(), "image_text_hidden_size": 8} | kwargs
    return LorgnetteForImageTextRetrieval.from_backbones(vision_model(), **kwargs).eval()


def batch(captions: list[str] = CAPTIONS) -> dict[str, torch.Tensor]:
    images = [picture(n) for n in range(len(captions))]
    return dict(processor()(images=images, text=captions, padding=True, return_tensors="pt"))
