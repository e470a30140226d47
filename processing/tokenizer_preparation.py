"""What a processor adds to the LM's tokenizer."""

import copy

from transformers import AddedToken, PreTrainedTokenizerBase
from transformers.utils import logging

from .prompt_encoding import IMAGE_TOKEN


logger = logging.get_logger(__name__)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The LM's tokenizer with `<image>`, a pad token and left padding; a copy, where it lacks any of them."""
    known = any(token.content == IMAGE_TOKEN and token.special for token in tokenizer.added_tokens_decoder.values())
    if known and tokenizer.pad_token is not None and tokenizer.padding_side == "left":
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{type(tokenizer).__name__} has neither a pad token nor an EOS token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning_once(f"The tokenizer has no pad token: {tokenizer.eos_token} serves as one.")
    return tokenizer
