"""Tokenizers and image processors small enough to build in a test, with the habits of the real ones."""

from functools import cache

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert import BertTokenizer
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


# SmolLM2's, to the letter but for the name: it inserts a system message of its own and crashes on a list as content.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Gemma's habits: writes <bos> itself, strips the content, refuses a system message.
GEMMA_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{{ '<start_of_turn>'"
    " + (message['role'] if message['role'] != 'assistant' else 'model')"
    " + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Qwen3's habit: a finished answer has an empty thought in front that the generation prompt has not.
THINKING = CHATML.replace(
    "message['content'] + '<|im_end|>'",
    "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + message['content'] + '<|im_end|>'",
)
_CORPUS = ["Describe the picture. A photo of a cat.", "a red car on the road", "What is this? The dog, the bird."] * 4


@cache
def _byte_level_backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return backend.to_str()


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML and an end-of-turn token, as SmolLM2 and Qwen have: no BOS is added."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_backend()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    if template is THINKING:
        tokenizer.add_tokens(["<think>", "</think>"])  # ordinary added tokens in Qwen3 as well, not special ones
    tokenizer.chat_template = template
    return tokenizer


def gemma_like_tokenizer() -> PreTrainedTokenizerFast:
    """Adds a BOS of its own to every text and has a template that writes one too."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_backend()),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )
    _add_at_start(tokenizer, "<bos>")
    tokenizer.chat_template = GEMMA_LIKE
    return tokenizer


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's habits: BOS in front, no pad token, no template; words begin with `▁`, the first one included."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    clean = Tokenizer(backend.model)  # without the added tokens that the trainer made of the byte tokens
    clean.normalizer, clean.decoder = backend.normalizer, backend.decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=clean, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    _add_at_start(tokenizer, "<s>")
    return tokenizer


def bert_tokenizer() -> BertTokenizer:
    """A lower-casing WordPiece tokenizer that wraps a text in [CLS] and [SEP], as the Q-Former's is."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!<>|_/-"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: index for index, token in enumerate([*tokens, "the", "picture", "cat"])})


def image_processor(size: int = 32) -> ViTImageProcessorPil:
    """A ViT's image processor for `size` x `size` pictures that needs no torchvision."""
    return ViTImageProcessorPil(size={"height": size, "width": size})


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    """An RGB picture of noise, the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _add_at_start(tokenizer: PreTrainedTokenizerFast, token: str) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))],
    )
