"""`LorgnettePreTrainedModel`: the frozen ViT that every model here has, and how a model is loaded and saved."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration.configuration_lorgnette import AUTO_MAP, LorgnetteConfig


class LorgnettePreTrainedModel(PreTrainedModel):
    """What every model here shares: a ViT that is frozen, stays in eval mode and builds no graph."""

    config: LorgnetteConfig
    config_class = LorgnetteConfig
    base_model_prefix = "lorgnette"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def freeze(self) -> None:
        """Leave gradients to what is trained; called after each way of building or loading the model."""
        self.vision_model.requires_grad_(False)

    def train(self, mode: bool = True) -> "LorgnettePreTrainedModel":
        super().train(mode)
        self.vision_model.eval()
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any):
        """As `PreTrainedModel.from_pretrained`; frozen parts come back frozen (transformers thaws what it loads)."""
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model._finish_loading(info["missing_keys"])
        return (model, info) if with_info else model

    def _finish_loading(self, missing_keys: set[str]) -> None:
        self.freeze()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; the folder loads where lorgnette is not installed."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the frozen ViT sees: `vision_feature_layer`, of all tokens or of the patches alone.

        Args:
            pixel_values: `(N, 3, H, W)`, or `(N, patches, values)` for SigLIP2's variable resolution.
            pixel_attention_mask: `(N, patches)`, SigLIP2 only.
            spatial_shapes: `(N, 2)` patches per side, SigLIP2 only.

        Returns:
            `(N, L, E)`, without a graph.
        """
        config = self.config.vision_config
        layer = self.config.vision_feature_layer
        variable_resolution = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        outputs = self.vision_model(
            pixel_values=pixel_values.to(self.vision_model.dtype),
            output_hidden_states=layer is not None,
            return_dict=True,
            **{name: value for name, value in variable_resolution.items() if value is not None},
        )
        features = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
        if self.config.vision_feature_select_strategy == "default" and pixel_values.ndim == 4:
            patch = config.patch_size if isinstance(config.patch_size, (tuple, list)) else [config.patch_size] * 2
            patches = (pixel_values.shape[-2] // patch[0]) * (pixel_values.shape[-1] // patch[1])
            features = features[:, features.shape[1] - patches :]  # CLS, distillation and register tokens come first
        return features


__all__ = ["LorgnettePreTrainedModel"]
