"""Benchmark data: pictures of noise, and captions with COCO's lengths, or with very mixed ones."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil
from transformers.models.bert.tokenization_bert import BertTokenizer

from benchmarks.shapes import Preset
from lorgnette import LorgnetteProcessor
from lorgnette.assembly.processors import BLIP2_TEMPLATE


PICTURES, TEXTS = 2, 5  # of a batch whose pictures have several captions, as COCO's have
WORDS_MEAN, WORDS_SD = 10.5, 2.4  # of COCO's captions
PICTURE = (640, 480)  # COCO's usual size
MEDIAN, LONGEST = 10.5, 100  # words of captions of mixed lengths, whose logarithm has a standard deviation of 1
_SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_ROLES = ("system", "user", "assistant")
# before the picture as many tokens as SmolLM2-135M-Instruct's own system message and "Describe the picture." are
SYSTEM_WORDS, QUERY_WORDS = 15, 5
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en", "ol")]


def words(count: int = 2000) -> list[str]:
    """Artificial words of one to three syllables, the shorter ones first."""
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


def with_texts(rows: Sequence[dict[str, Any]], texts: int, seed: int) -> list[dict[str, Any]]:
    """The rows' pictures with so many captions each, and a number of each picture."""
    made = captions(len(rows) * texts, seed)
    return [row | {"text": made[n * texts :][:texts], "image_id": n} for n, row in enumerate(rows)]


def texts_of(row: dict[str, Any]) -> list[str]:
    return row["text"] if isinstance(row["text"], list) else [row["text"]]


def pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each text of the rows."""
    return [row | {"text": text} for row in rows for text in texts_of(row)]


def captions(count: int, seed: int, mixed: bool = False) -> list[str]:
    """Random captions of different lengths; short words are more frequent.

    Args:
        mixed: many short and few long captions, from 3 to `LONGEST` words, instead of COCO's lengths.
    """
    generator = np.random.default_rng(seed)
    vocabulary = words()
    frequencies = 1 / np.arange(1, len(vocabulary) + 1)
    drawn = generator.lognormal(np.log(MEDIAN), 1, count) if mixed else generator.normal(WORDS_MEAN, WORDS_SD, count)
    lengths = drawn.round().clip(3, LONGEST).astype(int)
    while count > 1 and len(set(lengths)) == 1:
        lengths[0] += 1
    frequencies /= frequencies.sum()
    return [" ".join(generator.choice(vocabulary, length, p=frequencies)) for length in lengths]


def processor(preset: Preset, chat: bool = False) -> LorgnetteProcessor:
    """Stage 2's, with BLIP-2's prompts: pictures, BOS, caption, EOS.

    Args:
        chat: with `<SYSTEM> <QUERY> <IMAGE> <OUTPUT>` in ChatML instead, with the same ids.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(4096, preset.text.vocab_size - 1),  # BLIP-2's embedding table must have a row for <image>
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=_SPECIAL,
        show_progress=False,
    )
    backend.train_from_iterator([*_ROLES, *(f" {word}" for word in words())], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )
    prompt: dict[str, str] = {"query": "", "chat_template": BLIP2_TEMPLATE}
    if chat:
        texts = {"system_prompt": words()[:SYSTEM_WORDS], "query": words()[:QUERY_WORDS]}
        prompt = {name: " ".join(part) for name, part in texts.items()} | {"chat_template": CHAT_TEMPLATE}
    return LorgnetteProcessor(image_processor(preset), tokenizer, num_query_tokens=preset.num_query_tokens, **prompt)


def chat_prompt(preset: Preset) -> tuple[int, int]:
    """How many tokens a chat prompt has, and how many of them come before its picture."""
    own = processor(preset, chat=True)
    prompt, _ = own.encode_example("a")
    return len(prompt), prompt.index(own.image_token_id)


def stage1_processor(preset: Preset) -> LorgnetteProcessor:
    """Stage 1's processor: a BERT's tokenizer with `[DEC]`."""
    kept = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *words()]
    size = preset.config().qformer_config.vocab_size
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(kept[:size])}, bos_token="[DEC]")
    return LorgnetteProcessor(
        image_processor(preset), qformer_tokenizer=tokenizer, num_query_tokens=preset.num_query_tokens
    )


def image_processor(preset: Preset) -> ViTImageProcessorPil:
    side = preset.config().vision_config.image_size
    return ViTImageProcessorPil(size={"height": side, "width": side})
