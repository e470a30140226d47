"""`LorgnettePreTrainedModel`: the frozen ViT of every model, how the model is loaded and saved, what may train."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.utils import TransformersKwargs

from ..configuration.configuration_lorgnette import IN_PACKAGE, LorgnetteBridgeConfig, from_package
from .modeling_loading import is_in_parts, load_in_parts, refuse_missing
from .modeling_saving import (
    BundledProcessor,
    backbone_checksums,
    is_backbone_key,
    keys_to_ignore_on_save,
    quantizer_of,
    resolve_save_format,
    save,
)


# The one name that is used for the cache. transformers 5.24 renamed `past_key_values`, in outputs and keywords; of two
# names, both given, its decoders read `cache` alone.
KV_CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"
_HUB_KWARGS = ("revision", "cache_dir", "token", "local_files_only")
_PEFT_REFUSED = (
    "peft cannot put an adapter{name} on a whole lorgnette model: it would overwrite the trained LoRA, freeze the "
    "Q-Former and save neither. The language model has LoRA of its own: from_backbones(lora=…) makes it, Trainer and "
    "TRL train it without a peft_config, load_lm_adapter(…) replaces it"
)


class PeftConfigs(dict):
    """`peft_config` of a whole model. peft's tuners write into it before they change a weight."""

    def __setitem__(self, name: str, value: Any) -> None:
        raise ValueError(_PEFT_REFUSED.format(name=f" ({name!r})"))

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value


class LorgnettePreTrainedModel(PreTrainedModel):
    """What the models share: a ViT that is frozen, stays in eval mode and builds no graph."""

    config: LorgnetteBridgeConfig
    base_model_prefix = "lorgnette"
    input_modalities = ("image", "text")
    model_tags = ["lorgnette", "q-former"]  # noqa: RUF012 (transformers' own class attribute)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # the submodules that the thin format leaves out; the first is loaded first, the rest is placed beside it
    backbones: ClassVar[tuple[str, ...]] = ("vision_model",)
    has_loaded_backbones = False  # False where their weights are random: the model was made from a config alone
    _backbone_checksums: dict[str, int] | None = None  # of the weights as they were loaded
    _backbone_folders: dict[str, str] | None = None  # of those that were read from local folders
    _may_name_folders = False  # True while a recipe saves its checkpoints
    _is_saveable = False  # checked at the first training step
    _processor: Any = None  # the one the model was joined with, or a BundledProcessor

    def freeze(self) -> None:
        """Freeze the backbones, but for LoRA inside them. Called after each way of building or loading the model."""
        for name in self.backbones:
            for key, parameter in self.get_submodule(name).named_parameters():
                parameter.requires_grad_("lora_" in key)

    def train(self, mode: bool = True) -> "LorgnettePreTrainedModel":
        super().train(mode)
        self.vision_model.eval()
        return self

    def initialize_weights(self) -> None:
        """As `PreTrainedModel.initialize_weights`; of a part, as if it stood alone (Falcon-H1's decoder needs it)."""
        for part in self.children():
            if isinstance(part, PreTrainedModel):
                part.initialize_weights()
        super().initialize_weights()

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        return [*super().get_init_context(*args, **kwargs), no_init_weights()]  # what the files lack is drawn later

    def post_init(self) -> None:
        super().post_init()
        if IN_PACKAGE:
            from_package("assembly.guards", "").check_built(self)

    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """As `nn.Module.named_children`; a ValueError where peft calls it, as it does to add a prompt or a prefix."""
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "peft":
            raise ValueError(_PEFT_REFUSED.format(name=""))
        return super().named_children()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LorgnettePreTrainedModel":
        if IN_PACKAGE:  # `.half()` and the like pass here alone
            fn = from_package("assembly.frozen_weights", "").keep_checksums(self, fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """The frozen ViT's features `(N, L, E)`, as `last_hidden_state`, without a graph.

        Args:
            pixel_values: `(N, 3, H, W)`; or SigLIP2's variable resolution, `(N, patches, values)`, with
                `pixel_attention_mask` `(N, patches)` and `spatial_shapes` `(N, 2)`.
        """
        config = self.config.vision_config
        layer = self.config.vision_feature_layer
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        variable_resolution = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        outputs = self.vision_model(
            pixel_values=pixel_values.to(self.vision_model.device, self.vision_model.dtype),
            output_hidden_states=wanted or layer is not None,
            return_dict=True,
            **kwargs,
            **{name: value for name, value in variable_resolution.items() if value is not None},
        )
        features = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
        if self.config.vision_feature_select_strategy == "default" and pixel_values.ndim == 4:
            patch = config.patch_size if isinstance(config.patch_size, (tuple, list)) else [config.patch_size] * 2
            patches = (pixel_values.shape[-2] // patch[0]) * (pixel_values.shape[-1] // patch[1])
            features = features[:, features.shape[1] - patches :]  # CLS, distillation and register tokens come first
        return BaseModelOutput(
            features, hidden_states=outputs.hidden_states if wanted else None, attentions=outputs.attentions
        )

    def check_trainable(self) -> None:
        """Called where a loss is computed for training.

        Raises a ValueError where nothing trains, weights in float16 train, or the model cannot be saved.
        """
        if not torch.is_grad_enabled():
            return
        trained = [(key, value) for key, value in self.named_parameters() if value.requires_grad]
        if not trained:
            raise ValueError(
                f"Nothing of this {type(self).__name__} trains: all weights were frozen, as peft's "
                "prepare_model_for_kbit_training does: undo it with model.requires_grad_(True) and model.freeze()"
            )
        if half := [key for key, value in trained if value.dtype == torch.float16]:
            raise ValueError(
                f"{len(half)} weights that train are float16 ({half[0]}, …), in which Adam's epsilon (1e-8) is 0. Give "
                "dtype='float32' where the model is loaded, and fp16=True or bf16=True to Trainer; or dtype='bfloat16'"
            )
        if not self._is_saveable and not torch.compiler.is_compiling():
            # a model that is not quantised can be saved in full, whatever has changed in it
            resolve_save_format(self, None, None if quantizer_of(self) is not None else [])
            self._is_saveable = True

    @property
    def peft_config(self) -> PeftConfigs:
        """The adapters of the language model, as trackers log them; peft itself is refused."""
        return PeftConfigs(getattr(getattr(self, "language_model", None), "peft_config", None) or {})

    def _replicate_for_data_parallel(self) -> None:
        """What `nn.DataParallel` calls, in which Trainer wraps a model where one process has several GPUs: refused."""
        raise RuntimeError(
            f"nn.DataParallel cannot run {type(self).__name__}: it would cut pictures and rows apart. Start one "
            "process a GPU, with accelerate launch or torchrun, or show this process one: CUDA_VISIBLE_DEVICES=0"
        )

    def check_processor(self, processor: Any) -> None:
        """With the package: see [`~lorgnette.assembly.processor_checks.check_processor`]."""
        if IN_PACKAGE:
            from_package("assembly.processor_checks", "").check_processor(self, processor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any):
        """As `PreTrainedModel.from_pretrained`; frozen parts are frozen again. Only safetensors are read.

        The backbones of a model that was saved thin are loaded from their repositories at their commits.
        `quantization_config` and `device_map` are for the language model: see [`~modeling_loading.load_in_parts`].

        Raises an OSError where nothing is there, or no weights; a ValueError where weights of a backbone are missing,
        and, with the package, for what `assembly/guards.py` refuses.
        """
        name = pretrained_model_name_or_path
        with_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors is False, and pickled weights are not read")
        guarded = IN_PACKAGE and name is not None
        with from_package("assembly.guards", "").checked_loading(cls, name, **kwargs) if guarded else nullcontext():
            if guarded and kwargs.get("device_map") is not None:
                model, info = from_package("assembly.offloading", "").load_on_devices(cls, name, *args, **kwargs)
            elif is_in_parts(name, **kwargs):
                model, info = load_in_parts(cls, name, *args, **kwargs)
            else:
                forced = {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
                model, info = super().from_pretrained(name, *args, **kwargs | forced)
        if info["mismatched_keys"] and not kwargs.get("ignore_mismatched_sizes"):
            key, found, described = min(info["mismatched_keys"])
            raise ValueError(
                f"{name}: {key} is {tuple(found)} in the files, and {tuple(described)} by the config; "
                f"{len(info['mismatched_keys'])} weights do not fit"
            )
        if name is not None:
            hub = {key: kwargs[key] for key in _HUB_KWARGS if key in kwargs}
            model._processor = BundledProcessor(name, cls.config_class.model_type, **hub)
        model._finish_loading(set(info["missing_keys"]), set(info["unexpected_keys"]))
        return (model, info) if with_info else model

    def _finish_loading(self, missing: set[str], unexpected: set[str]) -> None:
        backbones = {key for key in missing if is_backbone_key(self, key)}
        refuse_missing(self.name_or_path or "The checkpoint", "its backbones", backbones)
        self.freeze()
        self.mark_backbones_loaded()

    def mark_backbones_loaded(self) -> None:
        """Called where the backbones hold their pretrained weights: from then on a save may leave them out."""
        self.has_loaded_backbones = True
        self._backbone_checksums = backbone_checksums(self, self.state_dict())
        self._keys_to_ignore_on_save = keys_to_ignore_on_save(self)

    def _known_processor(self, otherwise: str = "pass processor=") -> Any:
        """The processor that the model was joined with, or that is bundled with it; an error says what to do."""
        if self._processor is None:
            raise ValueError(f"No processor is known to this model: {otherwise}")
        if not isinstance(self._processor, BundledProcessor):
            return self._processor
        try:
            return self._processor.load()
        except OSError as error:
            raise OSError(f"{error}; {otherwise}") from error

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        save_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`; the folder loads where lorgnette is not installed.

        The processor is saved too, unless the folder has one. An error half way leaves an older save as it was.

        Args:
            save_format: `"thin"`: without the backbones, which are downloaded from the Hub when the model is loaded;
                `"full"`: everything; `"merged"`: everything, with LoRA merged into the language model, so that peft is
                not needed. By default thin where every backbone came from the Hub and is unchanged, merged where the
                model was loaded from a merged one, full otherwise.

        Raises a ValueError for a format that this model cannot be saved in, with the reason; an ImportError for
        `"merged"` without the package.
        """
        kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
        save(self, super().save_pretrained, save_directory, save_format, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As `PreTrainedModel.push_to_hub`; with the package see [`~lorgnette.publishing.model_push.push_model`]."""
        if IN_PACKAGE:
            return from_package("publishing.model_push", "").push_model(self, repo_id, **kwargs)
        return super().push_to_hub(repo_id, **kwargs)
