"""What ends an answer, where a base LM's generation config does not say it."""

from typing import Any

from transformers import GenerationConfig


def missing_tokens(config: GenerationConfig, processor: Any) -> dict[str, Any]:
    """`pad_token_id` and `eos_token_id` (a list) for `generate`, each where a base LM's generation config lacks it."""
    missing = {"pad_token_id": processor.tokenizer.pad_token_id} if config.pad_token_id is None else {}
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    eos = {token for token in eos if token is not None}
    if not eos.issuperset(processor.stop_token_ids):
        missing["eos_token_id"] = sorted({*eos, *processor.stop_token_ids})
    return missing
