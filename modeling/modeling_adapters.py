"""The language model's LoRA as seen from the whole model: on, off, and what would lose the rest is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .modeling_forms import keys_not_to_miss, refuse_offloaded
from .modeling_lm_adapter import (
    LM_ADAPTER,
    DetachedLora,
    detach_lora,
    load_lora_weights,
    put_back_lora,
    read_lm_adapter,
    write_lm_adapter,
)
from .modeling_lora import ADAPTER, attach_lora, lora_layers, switch_lora, without_lora


class LanguageModelAdapters:
    """Mixin of a model with a `language_model` that carries LoRA; transformers' own methods look at the whole model."""

    def _attach_lora(self) -> None:
        # inside the LM, driven by the config: so that a plain reload finds every key, and targets cannot hit the ViT
        attach_lora(self.language_model, self.config.lora_config)
        for name, module in self.language_model.named_modules():
            if "lora_" in name:
                module._is_hf_initialized = True  # peft has: transformers would overwrite the zeros of lora_B

    def _finish_loading(self, missing: set[str], unexpected: set[str]) -> None:
        unfilled = sorted(key for key in missing if without_lora(key) in unexpected)
        if unfilled:
            raise ValueError(
                f"{len(unfilled)} weights under LoRA are not in the checkpoint ({unfilled[0]}, …): it was saved "
                "without the LoRA that lora_config describes. from_backbones(lora=…) is where a model gets its LoRA"
            )
        for name, layer in self.language_model.named_modules():
            if f"language_model.{name}.lora_A.{ADAPTER}.weight" in missing:
                layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)
        super()._finish_loading(missing, unexpected)

    def freeze(self) -> None:
        super().freeze()
        for name, parameter in self.language_model.named_parameters():
            parameter.requires_grad_("lora_" in name)

    @property
    def max_text_length(self) -> int | None:
        """Tokens the LM has positions for, the placeholders' included; None where its config does not say."""
        return getattr(self.config.text_config, "max_position_embeddings", None)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    # kept here: the bridge in use may have no LoRA to be off, and the next one has
    _adapters_are_off: bool = False

    def enable_adapters(self) -> None:
        """Answer with LoRA again. Raises a ValueError where the model has none."""
        switch_lora(self.language_model, True)
        self._adapters_are_off = False

    def disable_adapters(self) -> None:
        """Answer as the original language model does. Raises a ValueError where there is no LoRA."""
        switch_lora(self.language_model, False)
        self._adapters_are_off = True

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the language model is the original one; after it, what it was before."""
        were_off = self._adapters_are_off
        self.disable_adapters()
        try:
            yield
        finally:
            self._adapters_are_off = were_off
            if not were_off and lora_layers(self.language_model):
                switch_lora(self.language_model, True)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: transformers would freeze the Q-Former, and save the adapter alone."""
        raise ValueError("An adapter on the whole model is saved without the Q-Former: give from_backbones(lora=…)")

    def load_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused, for the same reason."""
        raise ValueError("An adapter on the whole model is saved without the Q-Former: give from_backbones(lora=…)")

    def load_lm_adapter(self, source: str | Path, *, revision: str | None = None) -> None:
        """Put a LoRA that was trained on the bare language model, by peft alone, in the place of this model's.

        Args:
            source: a folder or Hub repository as `PeftModel.save_pretrained` writes them; `lm_adapter/` of a saved
                model is one too.
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it does not fit, see [`read_lm_adapter`]; or weights are offloaded. Nothing has changed then.
        """
        refuse_offloaded(self)
        self._replace_lora(*read_lm_adapter(source, self.config, revision))

    def _replace_lora(
        self, lora_config: dict[str, Any] | None, lora: dict[str, torch.Tensor] | DetachedLora
    ) -> DetachedLora:
        """Another LoRA, on or off as the present one is, or none at all; the present one is returned.

        Args:
            lora: its weights, or one that was on this language model before, which is put back as it is: building
                peft's layers anew takes as long as a short answer.

        Raises:
            ValueError: weights are offloaded.
        """
        refuse_offloaded(self)
        before, config_before = detach_lora(self.language_model), self.config.lora_config
        try:
            self._put_on_lora(lora_config, lora)
        except Exception:  # peft refuses some LoRA only while its weights are put in
            detach_lora(self.language_model)
            self.config.lora_config = config_before
            put_back_lora(self.language_model, before)
            raise
        self._name_backbones_anew()
        self.freeze()
        self.train(self.training)  # new layers are in train mode
        if lora_config is not None:
            switch_lora(self.language_model, not self._adapters_are_off)
        return before

    def _put_on_lora(self, lora_config: dict[str, Any] | None, lora: dict[str, torch.Tensor] | DetachedLora) -> None:
        """On a language model that has none."""
        self.config.lora_config = lora_config
        if isinstance(lora, DetachedLora):
            put_back_lora(self.language_model, lora)
        elif lora_config is not None:
            self._attach_lora()
        for layer in lora_layers(self.language_model).values():
            beside = next(layer.get_base_layer().parameters())  # which may have been moved meanwhile
            for name, parameter in layer.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(beside.device, self.projector.weight.dtype)
        if lora_config is not None and not isinstance(lora, DetachedLora):
            load_lora_weights(self.language_model, lora)

    def _name_backbones_anew(self) -> None:
        if self.has_loaded_backbones:  # under another LoRA their weights go by other names
            self._keys_to_ignore_on_save = keys_not_to_miss(self)

    def _save_beside(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        super()._save_beside(folder, state_dict)
        if self.config.lora_config is not None:
            write_lm_adapter(Path(folder, LM_ADAPTER), self.language_model, self.config, state_dict)


__all__ = ["LanguageModelAdapters"]
