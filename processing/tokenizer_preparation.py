"""What a processor changes in the LM's tokenizer: `<image>`, a pad token and left padding."""

import copy
import json
import re
from typing import Any

from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerBase
from transformers.utils import logging

from .prompt_encoding import IMAGE_TOKEN, is_in_template


logger = logging.get_logger(__name__)

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


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The LM's tokenizer with `<image>`, a pad token and left padding; a copy, where it lacks any of them.

    Raises:
        ValueError: it has neither a pad token nor an EOS token.
    """
    if has_image_token(tokenizer) and tokenizer.pad_token is not None and tokenizer.padding_side == "left":
        return tokenizer
    tokenizer = with_image_token(tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{type(tokenizer).__name__} has neither a pad token nor an EOS token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning_once(f"The tokenizer has no pad token: {tokenizer.eos_token} serves as one.")
    return tokenizer


def refuse_own_class(what: str, part: Any) -> None:
    """Raises a ValueError for a part of a processor that a saved folder would load as something else, or not at all."""
    kind = type(part)
    if part is not None and kind.__module__.split(".")[0] not in ("transformers", "tokenizers"):
        raise ValueError(
            f"The {what} is a {kind.__name__}, which is defined in {kind.__module__}: a saved model would not bring "
            "its code along. Give one whose class is transformers' own"
        )


def has_image_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    return any(token.content == IMAGE_TOKEN and token.special for token in tokenizer.added_tokens_decoder.values())


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that has `<image>` as a special token.

    It takes the place, and so the id, of a token that the vocabulary keeps free, since vLLM and others look every id up
    in the LM's table. Where there is none it is the next free id: that is inside the table where the table is padded.
    """
    tokenizer = copy.deepcopy(tokenizer)
    reserved = None if IMAGE_TOKEN in tokenizer.get_vocab() else _reserved_token(tokenizer)
    if reserved is None:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    else:
        _rename(tokenizer, reserved)
    return tokenizer


def _reserved_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The last of the tokens that are kept free; None where there is none, or the tokenizer is not a fast one."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    named = {str(token) for token in tokenizer.special_tokens_map.values() if not isinstance(token, (list, dict))}
    found = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    free = [name for name in found if _RESERVED.fullmatch(name) and name not in named]
    return next((name for name in reversed(free) if not is_in_template(tokenizer, name)), None)


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
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))  # `backend_tokenizer` can be read alone
    extra = [token for token in getattr(tokenizer, "extra_special_tokens", None) or [] if str(token) != old]
    tokenizer.extra_special_tokens = extra  # of which a reload would add the old one anew
