"""`LorgnetteRetrievalConfig`: a ViT and a Q-Former with a text half, and the weights of stage 1's losses."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from .configuration_lorgnette import AUTO_PROCESSOR, LorgnetteBridgeConfig, LorgnetteQFormerConfig, require_sizes


@strict
class LorgnetteRetrievalConfig(LorgnetteBridgeConfig):
    """Stage 1: a ViT and a Q-Former with a text half, and the losses that align picture and text (BLIP-2, section 3.1).

    It has the fields of [`LorgnetteBridgeConfig`] besides its own.

    Args:
        itc_weight, itm_weight, itg_weight: of image-text contrast, matching and image-grounded generation in the loss.
            What serves only losses of weight 0 is not built.
        itc_loss: `"softmax"` over the batch (CLIP, BLIP-2), or `"sigmoid"` of each pair (SigLIP, Zhai et al. 2023).
        itc_label_smoothing: of the softmax, 0.1 as in BLIP-2.
        max_logit_scale: one over the least temperature of ITC; CLIP (Radford et al. 2021, section 2.5) has 100.
        matching_batch: how many pictures of a batch, the first ones with their texts, ITM and ITG learn from in
            training. ITC compares all, and the Q-Former runs on so many at a time: its activations are never those of
            all. None: all learn from all, at once.
        text_pooling: what ITC compares of a text: `"cls"`, its first token; or `"mean"`, the mean of its tokens, as
            sentence encoders mostly do.
        image_text_hidden_size: width of the space in which pictures and texts are compared (`Blip2Config` has it).

    Raises:
        ValueError: a weight below 0, no weight above 0, a Q-Former without a text half, `[DEC]` missing.
    """

    model_type = "lorgnette_retrieval"
    sub_configs = {"vision_config": AutoConfig, "qformer_config": LorgnetteQFormerConfig}  # noqa: RUF012
    _auto_map = {  # noqa: RUF012
        "AutoConfig": "configuration_retrieval.LorgnetteRetrievalConfig",
        "AutoModel": "modeling_retrieval.LorgnetteForImageTextRetrieval",
        "AutoProcessor": AUTO_PROCESSOR,
    }

    itc_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    itg_weight: float | int = 1.0
    itc_loss: str = "softmax"
    itc_label_smoothing: float | int = 0.1
    max_logit_scale: float | int = 100.0
    matching_batch: int | None = None
    text_pooling: str = "cls"
    image_text_hidden_size: int = 256

    def __post_init__(self, **kwargs: Any):
        if self.qformer_config is None:
            self.qformer_config = LorgnetteQFormerConfig(use_qformer_text_input=True)
            self.qformer_config.dec_token_id = self.qformer_config.vocab_size - 1
        super().__post_init__(**kwargs)
        self.pad_token_id = self.qformer_config.pad_token_id  # where Trainer looks for it, and would otherwise warn
        require_sizes(self, "image_text_hidden_size", "matching_batch")
        for name, values in (("text_pooling", ("cls", "mean")), ("itc_loss", ("softmax", "sigmoid"))):
            if getattr(self, name) not in values:
                raise ValueError(f'{name} is {getattr(self, name)!r}; it takes "{values[0]}" or "{values[1]}"')
        if not 0 <= self.itc_label_smoothing < 1 or self.max_logit_scale < 1:
            given = f"itc_label_smoothing is {self.itc_label_smoothing}, max_logit_scale {self.max_logit_scale}"
            raise ValueError(f"{given}: the former is a share, at least 0 and below 1, the latter at least 1")
        require_sizes(self.qformer_config, "num_hidden_layers")
        for name in ("itc_weight", "itm_weight", "itg_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 0")
        if not (self.itc_weight or self.itm_weight or self.itg_weight):
            raise ValueError("itc_weight, itm_weight and itg_weight are all 0: there is no loss left")
        if not self.qformer_config.use_qformer_text_input:
            raise ValueError("qformer_config.use_qformer_text_input is False: stage 1 needs the text half")
        if self.itg_weight and self.qformer_config.dec_token_id is None:
            raise ValueError("qformer_config.dec_token_id is not set: generation (itg_weight above 0) starts there")
