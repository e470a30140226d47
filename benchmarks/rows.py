"""Pairs to be fast on: pictures of noise, and captions whose lengths are spread as those of COCO are."""

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil
from transformers.models.bert.tokenization_bert import BertTokenizer

from benchmarks.shapes import Preset
from lorgnette import LorgnetteProcessor
from lorgnette.processing.blip2_prompts import BLIP2_TEMPLATE


WORDS_MEAN, WORDS_SD = 10.5, 2.4  # of COCO's captions
PICTURE = (640, 480)  # COCO's usual size
_SPECIAL = ["<pad>", "<s>", "</s>"]
_SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en", "ol")]


def words(count: int = 2000) -> list[str]:
    """Made-up words of one to three syllables, the shorter ones first."""
    generator = np.random.default_rng(0)
    made = {"".join(generator.choice(_SYLLABLES, generator.integers(1, 4))): None for _ in range(2 * count)}
    return sorted(made, key=len)[:count]


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """`image`, the bytes of a JPEG as `datasets.Image(decode=False)` gives them, and `text`."""
    generator = np.random.default_rng(seed)
    made = []
    for text in captions(count, seed):
        coarse = generator.integers(0, 256, (PICTURE[1] // 16, PICTURE[0] // 16, 3), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(coarse).resize(PICTURE).save(file, "JPEG")
        made.append({"image": {"bytes": file.getvalue(), "path": None}, "text": text})
    return made


def captions(count: int, seed: int) -> list[str]:
    """Several are never all of one length. Short words are more frequent than long ones."""
    generator = np.random.default_rng(seed)
    vocabulary = words()
    frequencies = 1 / np.arange(1, len(vocabulary) + 1)
    lengths = generator.normal(WORDS_MEAN, WORDS_SD, count).round().clip(min=3).astype(int)
    while count > 1 and len(set(lengths)) == 1:
        lengths[0] += 1
    frequencies /= frequencies.sum()
    return [" ".join(generator.choice(vocabulary, length, p=frequencies)) for length in lengths]


def processor(preset: Preset) -> LorgnetteProcessor:
    """Stage 2's, with BLIP-2's prompts: pictures, BOS, caption, EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(4096, preset.text.vocab_size - 1),  # <image> has to be a row of BLIP-2's table
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=_SPECIAL,
        show_progress=False,
    )
    backend.train_from_iterator([f" {word}" for word in words()], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )
    return LorgnetteProcessor(
        image_processor(preset),
        tokenizer,
        num_query_tokens=preset.num_query_tokens,
        query="",
        chat_template=BLIP2_TEMPLATE,
    )


def stage1_processor(preset: Preset) -> LorgnetteProcessor:
    """Stage 1's: a BERT's tokenizer that knows `[DEC]`."""
    kept = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *words()]
    size = preset.config().qformer_config.vocab_size
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(kept[:size])}, bos_token="[DEC]")
    return LorgnetteProcessor(
        image_processor(preset), qformer_tokenizer=tokenizer, num_query_tokens=preset.num_query_tokens
    )


def image_processor(preset: Preset) -> ViTImageProcessorPil:
    side = preset.config().vision_config.image_size
    return ViTImageProcessorPil(size={"height": side, "width": side})
