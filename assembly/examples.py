"""Training examples as token ids: the prompt exactly as at inference, and the target answer."""

from typing import Any

from ..processing.prompt_encoding import cached_per_tokenizer, chat_templates


def encode_example(
    processor: Any,
    output: str | None,
    *,
    query: str | None = None,
    system: str | None = None,
    num_images: int = 1,
    messages: list[dict[str, Any]] | None = None,
) -> tuple[list[int], list[int]]:
    """What [`LorgnetteProcessor.encode_example`] returns.

    Args:
        processor: for stage 2.
        output: the answer. The ids that end it follow it: the template's end of turn, or EOS. None: no answer.
        query, system, num_images: as in [`LorgnetteProcessor.build_prompt`].
        messages: the conversation before the answer, in place of the three.

    Returns:
        The prompt's ids, placeholders and all, and the answer's (none without one).

    Raises:
        ValueError: the template refuses the conversation, or does not show where an answer ends.
    """

    def prompt_ids() -> list[int]:
        if messages is not None:
            return processor.encode_prompt(processor.apply_chat_template(messages, add_generation_prompt=True))
        return processor.encode_prompt(processor.build_prompt(query, system, num_images=num_images))

    changes = "strftime_now" in chat_templates(processor.tokenizer)  # Llama 3's template writes the date
    if messages is not None or changes:
        ids = prompt_ids()
    else:  # usually equal for all rows
        settings = (processor.query, processor.system_prompt, processor.num_query_tokens)
        ids = list(cached_per_tokenizer(processor.tokenizer, (query, system, num_images, *settings), prompt_ids))
    if output is None:
        return ids, []
    return ids, processor.encode_answer(output)
