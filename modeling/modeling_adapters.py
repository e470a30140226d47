"""The language model's LoRA as seen from the whole model: on, off, and what would lose the rest is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .modeling_lora import lora_layers


class LanguageModelAdapters:
    """Mixin of a model whose `language_model` carries LoRA; transformers' own methods look at the whole model."""

    def enable_adapters(self) -> None:
        """Answer with LoRA again. Raises a ValueError where the model has none."""
        self.language_model.enable_adapters()

    def disable_adapters(self) -> None:
        """Answer as the original language model does. Raises a ValueError where there is no LoRA."""
        self.language_model.disable_adapters()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the language model is the original one; after it, what it was before."""
        were_off = any(layer.disable_adapters for layer in lora_layers(self.language_model).values())
        self.disable_adapters()
        try:
            yield
        finally:
            if not were_off:
                self.enable_adapters()

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: transformers would freeze the Q-Former, and save the adapter alone."""
        raise ValueError("An adapter on the whole model is saved without the Q-Former: give from_backbones(lora=…)")

    def load_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused, for the same reason."""
        raise ValueError("An adapter on the whole model is saved without the Q-Former: give from_backbones(lora=…)")

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """See [`~LorgnettePreTrainedModel.save_pretrained`].

        Raises:
            ValueError: the language model has adapters that the config does not describe and a reload would lose.
        """
        lost = sorted(set(getattr(self.language_model, "peft_config", {})) - {"default"})
        if lost:
            raise ValueError(f"Adapters {lost} of the language model are not in lora_config, and would be lost")
        super().save_pretrained(save_directory, *args, **kwargs)


__all__ = ["LanguageModelAdapters"]
