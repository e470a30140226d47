"""What `LorgnetteProcessor.from_backbones` and `from_blip2` do, and the preparation of an LM's tokenizer."""

import copy
import json
import re
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer
from transformers import AddedToken, AutoConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,  # the top level's needs torchvision (5.17)
)
from transformers.utils import logging

from ..processing.prompt_encoding import IMAGE_TOKEN, chat_templates, is_prepared
from .sources import from_pretrained_arguments, load_part, load_qformer_tokenizer, load_tokenizer


logger = logging.get_logger(__name__)

MAX_QUERY_TOKENS = 2**16  # the processor writes as many placeholders per image
Processor = TypeVar("Processor")

# Added tokens that a vocabulary keeps free: Llama 3's <|reserved_special_token_7|>, Gemma's <unused7>, Phi 3's
# <|placeholder7|>, Falcon 3's >>UNUSED_7<<, Mistral's [control_8] and <SPECIAL_20>, InternLM's [UNUSED_TOKEN_141],
# Qwen's <|extra_0|>, DeepSeek's place▁holder▁no▁7, [PAD151700] of tables that were converted. T5 uses its <extra_id_0>,
# but it is no causal LM, and this is the tokenizer of one.
_KINDS = (
    "(reserved|unused)([_ ]special)?([_ ]token)?",
    "place(holder|▁holder▁no)",
    "dummy|special|control|pad|extra(_id)?",
)
_RESERVED = re.compile(rf"\W{{1,2}}({'|'.join(_KINDS)})[_ ▁]?\d+(_token)?\W{{1,2}}", re.IGNORECASE)
# BLIP-2's prompts (`Blip2Processor.__call__`): pictures first, then BOS, then the words. A line that is `<image>` and
# nothing else is a picture: in users' words it is escaped, and so another string.
BLIP2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('BLIP-2 knows no other role than user and assistant: put it in the query') }}{% endif %}"
    "{% set lines = message['content'].split('\n') %}"
    "{{ lines | select('equalto', '<image>') | join('') }}"
    "{% if loop.first %}{{ bos_token }}{% else %} {% endif %}"
    "{{ lines | reject('equalto', '<image>') | join('\n') }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def check_processor_fields(
    image_processor: Any, tokenizer: Any, qformer_tokenizer: Any, num_query_tokens: int, max_image_pixels: int
) -> None:
    """Raises a ValueError for what [`LorgnetteProcessor`] cannot be made of: no tokenizer, or a number out of range.

    A part whose class is not transformers' own is refused too: a saved folder would load it as something else, or not.
    """
    if tokenizer is None and qformer_tokenizer is None:
        raise ValueError("a tokenizer is needed: the LM's, or in stage 1 the Q-Former's (qformer_tokenizer)")
    for name, value in (("num_query_tokens", num_query_tokens), ("max_image_pixels", max_image_pixels)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it has to be a whole number of at least 1")
    if num_query_tokens > MAX_QUERY_TOKENS:
        raise ValueError(f"num_query_tokens is {num_query_tokens}; at most {MAX_QUERY_TOKENS} are allowed")
    parts = {"image processor": image_processor, "tokenizer": tokenizer, "Q-Former's tokenizer": qformer_tokenizer}
    for what, part in parts.items():
        kind = type(part)
        if part is not None and kind.__module__.split(".")[0] not in ("transformers", "tokenizers"):
            raise ValueError(
                f"The {what} is a {kind.__name__}, which is defined in {kind.__module__}: a saved model would not "
                "bring its code along. Give one whose class is transformers' own"
            )


def from_backbones(
    cls: type[Processor],
    vision: str | Path | BaseImageProcessor,
    text: str | Path | PreTrainedTokenizerBase | None,
    *,
    qformer: str | Path | PreTrainedTokenizerBase | None = None,
    vision_revision: str | None = None,
    text_revision: str | None = None,
    qformer_revision: str | None = None,
    **fields: Any,
) -> Processor:
    """Make a processor from the backbones' own parts.

    Args:
        cls: the processor's class.
        vision: the ViT: Hub id, local folder, or its image processor.
        text: the LM: Hub id, local folder, `.gguf` file, or its tokenizer. None in stage 1.
        qformer: where the Q-Former's tokenizer comes from: the same kinds.
        vision_revision, text_revision, qformer_revision: branch, tag or commit on the Hub.
        fields: of [`LorgnetteProcessor`]: `num_query_tokens`, `system_prompt`, `query` and so on.

    Raises:
        ValueError: see the class. `OSError` for a backbone that cannot be found, as transformers has it.
    """
    if isinstance(vision, (str, Path)):
        name, keywords = from_pretrained_arguments(vision, vision_revision)
        vision = load_part(AutoImageProcessor, "image processor", name, **keywords)
    tokenizers = load_tokenizer(text, text_revision), load_qformer_tokenizer(qformer, qformer_revision)
    return cls(vision, *tokenizers, **fields)


def from_blip2(cls: type[Processor], source: str | Path, *, query: str = "", revision: str | None = None) -> Processor:
    """Make the processor of a `Blip2ForConditionalGeneration`, with prompts as BLIP-2 has them: pictures, BOS, words.

    Args:
        cls: the processor's class.
        source: Hub id or local folder, with its image processor and tokenizer.
        query: the default query; BLIP-2 was trained on `"Question: … Answer:"`, and on an empty prompt for
            captions.
        revision: branch, tag or commit on the Hub.
    """
    name, keywords = from_pretrained_arguments(source, revision)
    return cls(
        load_part(AutoImageProcessor, "image processor", name, **keywords),
        load_tokenizer(source, revision),
        num_query_tokens=AutoConfig.from_pretrained(name, **keywords).num_query_tokens,
        query=query,
        chat_template=BLIP2_TEMPLATE,
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The LM's tokenizer with `<image>`, a pad token and left padding; a copy, if it lacks any of them.

    Raises:
        ValueError: it has neither a pad token nor an EOS token.
    """
    if is_prepared(tokenizer):
        return tokenizer
    tokenizer = with_image_token(tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the one for now, the other to be saved
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{type(tokenizer).__name__} has neither a pad token nor an EOS token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning_once(f"The tokenizer has no pad token: {tokenizer.eos_token} serves as one.")
    return tokenizer


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy with `<image>` as a special token.

    It gets the id of an unused token of the vocabulary, since vLLM and others look every id up in the embedding table.
    Without an unused token it gets the next free id, which a padded table still holds.
    """
    tokenizer = copy.deepcopy(tokenizer)
    reserved = None if IMAGE_TOKEN in tokenizer.get_vocab() else _reserved_token(tokenizer)
    if reserved is None:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    else:
        _rename(tokenizer, reserved)
    return tokenizer


def _reserved_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The last token that the vocabulary keeps free; None where there is none, or the tokenizer is not a fast one."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    named = {str(token) for token in tokenizer.special_tokens_map.values() if not isinstance(token, (list, dict))}
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items(), reverse=True)]
    free = (name for name in added if _RESERVED.fullmatch(name) and name not in named)
    return next((name for name in free if name not in chat_templates(tokenizer)), None)


def _rename(tokenizer: PreTrainedTokenizerBase, old: str) -> None:
    """Call an added token `<image>`, in place; its id stays."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        if token["content"] == old:
            plain = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
            token.update(content=IMAGE_TOKEN, special=True, **plain)
    vocabulary = state["model"].get("vocab")
    if isinstance(vocabulary, dict) and old in vocabulary:
        vocabulary[IMAGE_TOKEN] = vocabulary.pop(old)
    elif isinstance(vocabulary, list):  # Unigram's: pieces with their scores
        state["model"]["vocab"] = [[IMAGE_TOKEN if piece == old else piece, score] for piece, score in vocabulary]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))  # `backend_tokenizer` is read-only
    extra = [token for token in getattr(tokenizer, "extra_special_tokens", None) or [] if str(token) != old]
    tokenizer.extra_special_tokens = extra  # a reload would add the old one again
