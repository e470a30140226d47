"""Whether a processor makes the inputs of a model."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_processor(model: PreTrainedModel, processor: Any) -> None:
    """Check that a processor makes the inputs of a model of either stage.

    Raises:
        ValueError: another placeholder or another number of them, with both; a processor of the other stage; tokens
            past the table of embeddings; a Q-Former that takes instructions and a processor without its tokenizer, or
            the reverse; the Q-Former's tokenizer has more tokens than the Q-Former, or uses the id of `[DEC]`.
    """
    config, tokenizer = model.config.qformer_config, processor.qformer_tokenizer
    is_stage1 = not hasattr(model, "language_model")
    if is_stage1 and not processor.is_stage1:
        raise ValueError("This is no stage-1 processor: make one with text=None and qformer= (the Q-Former's BERT)")
    for field in ("image_token_id", "num_query_tokens"):
        ours, theirs = getattr(model.config, field, None), getattr(processor, field)
        if ours != theirs:
            raise ValueError(f"The model's {field} is {ours}, the processor's {theirs}: they do not belong together")
    if is_stage1:
        room = config.vocab_size if config.dec_token_id is None else config.dec_token_id
        if len(tokenizer) > room and tokenizer.convert_tokens_to_ids("[DEC]") != config.dec_token_id:
            tokens = len(tokenizer)
            raise ValueError(f"The Q-Former has room for {room} tokens; the processor's qformer_tokenizer has {tokens}")
        return
    check_token_ids(processor.tokenizer, processor.image_token_id, model.get_input_embeddings().num_embeddings)
    if config.use_qformer_text_input != (tokenizer is not None):
        raise ValueError(
            f"qformer_config.use_qformer_text_input is {config.use_qformer_text_input}, and the processor has "
            f"{'no' if tokenizer is None else 'a'} qformer_tokenizer: instructions need both"
        )
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"qformer_config.vocab_size is {config.vocab_size}, and the processor's qformer_tokenizer has "
            f"{len(tokenizer)} tokens"
        )


def check_token_ids(tokenizer: PreTrainedTokenizerBase, image_token_id: int, num_embeddings: int) -> None:
    """Check that the language model has an embedding for every token but the placeholder.

    Raises:
        ValueError: names the first token without one, and what to do.
    """
    ids = {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ != image_token_id}
    past = sorted(id_ for id_ in ids if id_ >= num_embeddings)
    if past:
        raise ValueError(
            f"{len(past)} tokens of the tokenizer are past the language model's table of {num_embeddings} embeddings "
            f"({ids[past[0]]!r} has the id {past[0]}): load the language model, call resize_token_embeddings("
            f"{past[-1] + 1}) on it, and give from_backbones the resized model"
        )


__all__ = ["check_processor", "check_token_ids"]
