"""`LorgnettePreTrainedModel`: the frozen ViT that every model here has, and how a model is loaded and saved."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Unpack

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import ProcessorMixin
from transformers.utils import PROCESSOR_NAME, TransformersKwargs

from ..configuration.configuration_lorgnette import LorgnetteBridgeConfig
from .modeling_backbones import is_unread, refuse_missing
from .modeling_card import complete_card
from .modeling_companions import ProcessorBeside
from .modeling_forms import (
    backbone_checksums,
    changed_backbone_weights,
    in_form,
    is_backbone_key,
    keeping_checksums,
    keys_never_saved,
    keys_not_to_miss,
    quantizer_of,
    resolve_form,
)
from .modeling_structure import difference, without_weights
from .modeling_thin import WHERE, is_thin, load_in_parts
from .modeling_weight_files import check_fits, weight_files
from .modeling_whole_folder import written_whole


_HUB_KWARGS = ("revision", "cache_dir", "token", "local_files_only")
_PUSH_KWARGS = ("repo_id", "commit_message", "commit_description", "private", "create_pr")


_PEFT_REFUSED = (
    "peft cannot put an adapter{name} on a whole lorgnette model: it would go to the ViT too, overwrite "
    "the LoRA that was trained, freeze the Q-Former and save neither of them. The language model has LoRA of "
    "its own: from_backbones(lora=…) makes it, Trainer and TRL train it without a peft_config, and "
    "load_lm_adapter(…) puts another in its place"
)


class PeftConfigs(dict):
    """`peft_config` of a whole model. peft's tuners write into it before they touch a weight."""

    def __setitem__(self, name: str, value: Any) -> None:
        raise ValueError(_PEFT_REFUSED.format(name=f" ({name!r})"))

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value


class LorgnettePreTrainedModel(PreTrainedModel):
    """What every model here shares: a ViT that is frozen, stays in eval mode and builds no graph."""

    config: LorgnetteBridgeConfig
    base_model_prefix = "lorgnette"
    input_modalities = ("image", "text")
    model_tags = ["lorgnette", "q-former"]  # noqa: RUF012 (transformers' own; in the card that `push_to_hub` writes)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # the submodules that a thin save leaves out; the first is loaded first, and the rest is put beside it
    backbones: ClassVar[tuple[str, ...]] = ("vision_model",)
    # False where they are random numbers: a config that names them was all that the model was made from
    has_loaded_backbones = False
    # of their weights, as they were loaded; None where they were not
    _backbone_checksums: dict[str, int] | None = None
    _is_saveable = False  # found at the first training step

    # the processor that belongs to this model, if it is known: the one it was joined with, or the one it lay beside
    _processor: Any = None
    # `form` and `state_dict` of a `push_to_hub`, while transformers' calls `save_pretrained`, and does not pass them on
    _to_push: Mapping[str, Any] = MappingProxyType({})

    def freeze(self) -> None:
        """Leave gradients to what is trained; called after each way of building or loading the model."""
        self.vision_model.requires_grad_(False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LorgnettePreTrainedModel":
        return super()._apply(keeping_checksums(self, fn), recurse)

    def initialize_weights(self) -> None:
        """As `PreTrainedModel.initialize_weights`, for each part as it does for a model that stands alone.

        transformers leaves out modules without weights of their own where the outermost model is not its own code, and
        with them buffers that a decoder fills for its layers (Falcon-H1).
        """
        for part in self.children():
            if isinstance(part, PreTrainedModel):
                part.initialize_weights()
        super().initialize_weights()

    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """As `nn.Module.named_children`. peft asks for it where a prompt or prefix is to be learned (it keeps their
        configs to itself), and freezes each child that it is given: who asks is all that can be known before.

        Raises:
            ValueError: peft asks.
        """
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "peft":
            raise ValueError(_PEFT_REFUSED.format(name=""))
        return super().named_children()

    def train(self, mode: bool = True) -> "LorgnettePreTrainedModel":
        super().train(mode)
        self.vision_model.eval()
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any):
        """As `PreTrainedModel.from_pretrained`; frozen parts come back frozen (transformers thaws what it loads).

        Of a model that was saved thin the backbones are loaded too, from their repositories at their commits.
        `quantization_config` is for the language model alone: see [`~modeling_thin.load_in_parts`].

        Only safetensors are read, whatever else lies in the folder.

        Raises:
            OSError: nothing there, or no weights.
            ValueError: weights of a backbone are not there; transformers alone would draw random ones. Pickled weights,
                an adapter beside them, a config that describes other shapes than the files hold, or a keyword or
                `config` that contradicts the one they were trained with: see
                [`~modeling_weight_files.weight_files`] and [`~modeling_weight_files.check_fits`].
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors is False, and pickled weights are not read")
        with_info = kwargs.pop("output_loading_info", False)
        hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
        # these are for parts, and transformers would take them for the whole
        by_part = any(kwargs.get(name) is not None for name in ("quantization_config", "device_map"))
        by_part = by_part and pretrained_model_name_or_path is not None
        thin, files = is_thin(pretrained_model_name_or_path, **kwargs), []
        if pretrained_model_name_or_path is not None:
            where = {name: kwargs[name] for name in WHERE if name in kwargs}
            files = weight_files(pretrained_model_name_or_path, kwargs.get("variant"), **where)
            check_fits(cls, pretrained_model_name_or_path, files, thin, where, **kwargs)
        if thin or by_part:
            model, info = load_in_parts(cls, pretrained_model_name_or_path, files, *args, **kwargs)
        else:
            told = {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **(kwargs | told))
            if info["mismatched_keys"] and not kwargs.get("ignore_mismatched_sizes"):
                key, found, described = min(info["mismatched_keys"])
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {key} is {tuple(found)} in the files, and {tuple(described)} by "
                    f"the config; {len(info['mismatched_keys'])} weights do not fit"
                )
        if pretrained_model_name_or_path is not None:
            model._processor = ProcessorBeside(pretrained_model_name_or_path, **hub_kwargs)
        model._finish_loading(set(info["missing_keys"]), set(info["unexpected_keys"]))
        return (model, info) if with_info else model

    def _finish_loading(self, missing: set[str], unexpected: set[str]) -> None:
        backbones = {key for key in missing if is_backbone_key(self, key)}
        refuse_missing(self.name_or_path or "The checkpoint", "its backbones", backbones)
        self.freeze()
        self.say_backbones_are_loaded()

    def cast_parameters(self, dtype: torch.dtype) -> None:
        """Bring all parameters into one dtype, but those of backbones that were loaded in it.

        Buffers keep theirs, as in any `from_pretrained`: RoPE's frequencies are float32 in every model.
        """
        loaded_so = [name for name in self.backbones if self.get_submodule(name).dtype == dtype]
        for key, parameter in self.named_parameters():
            # transformers keeps some weights of some models in float32 on purpose
            apart = is_backbone_key(self, key) and key.split(".", 1)[0] in loaded_so
            if parameter.is_floating_point() and not apart:
                parameter.data = parameter.data.to(dtype)

    def check_trainable(self) -> None:
        """Called where a loss is computed to be learned from.

        Weights in float16 can be used, and not trained. bfloat16 has float32's range, and mixed precision keeps float32
        weights: both may train.

        Raises:
            ValueError: nothing trains, or weights in float16; names the first weight, and the reason. The model could
                not be saved, see [`~modeling_forms.resolve_form`]: what it learns would be lost.
        """
        if not torch.is_grad_enabled():
            return
        trained = [(key, value) for key, value in self.named_parameters() if value.requires_grad]
        if not trained:
            raise ValueError(
                f"Nothing of this {type(self).__name__} trains: all weights were frozen after it was loaded, as peft's "
                "prepare_model_for_kbit_training does. A model here freezes by itself what is not to be trained: leave "
                "that call out, or undo it with model.requires_grad_(True) and model.freeze()"
            )
        half = [key for key, value in trained if value.dtype == torch.float16]
        if half:
            raise ValueError(
                f"{len(half)} weights that train are float16 ({half[0]}, …). Adam's epsilon (1e-8) and the squares of "
                "gradients below 2e-4 are 0 in it, and what is divided by them is not finite. Give dtype='float32' "
                "where the model is built or loaded, and fp16=True or bf16=True to Trainer; or dtype='bfloat16'"
            )
        if not self._is_saveable and not torch.compiler.is_compiling():
            # a model that is not quantised can be saved in full, whatever has changed in it
            resolve_form(self, None, None if quantizer_of(self) is not None else [])
            self._is_saveable = True

    @property
    def peft_config(self) -> "PeftConfigs":
        """The adapters of the language model, as integrations of trackers log them; peft itself is refused."""
        return PeftConfigs(getattr(getattr(self, "language_model", None), "peft_config", None) or {})

    def _replicate_for_data_parallel(self) -> None:
        """What `nn.DataParallel` calls, in which Trainer wraps a model that one process has several GPUs for.

        Raises:
            RuntimeError: always. It would cut every tensor of a batch into as many parts, pictures as well as rows.
        """
        raise RuntimeError(
            f"nn.DataParallel cannot run {type(self).__name__}: it cuts pictures and rows apart, of which a batch may "
            "have different numbers. Start one process a GPU, with accelerate launch or torchrun, or show this process "
            "one GPU: CUDA_VISIBLE_DEVICES=0"
        )

    def say_backbones_are_loaded(self) -> None:
        """Called where the backbones hold what was pretrained: from now on a save may leave them out."""
        self.has_loaded_backbones = True
        self._backbone_checksums = backbone_checksums(self, self.state_dict())
        self._keys_to_ignore_on_save = keys_not_to_miss(self)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        form: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`; the folder loads where lorgnette is not installed.

        A processor that the model was joined with, or that lay beside it where it was loaded, is saved along with it,
        unless the folder has one. An error half way leaves an older save as it was.

        Args:
            form: `"thin"`: without the backbones, which are fetched from the Hub when the model is loaded; `"full"`:
                all that there is; `"merged"`: that, with LoRA folded into the language model, so that peft is not
                needed. By default thin where every backbone came from the Hub and is still what it was, full otherwise,
                and merged where the model was loaded from a merged one, which has no LoRA left to be saved apart.

        Raises:
            ValueError: another form, or one that this model cannot be saved in; says why. A processor that no longer
                fits. `variant` or
                `save_original_format` with the thin form, whose files have one name and one format.
        """
        if hasattr(self, "check_processor") and isinstance(self._processor, ProcessorMixin):  # it may have grown tokens
            self.check_processor(self._processor)
        state_dict = self._to_push.get("state_dict") if state_dict is None else state_dict
        changed = changed_backbone_weights(self, state_dict)
        form = resolve_form(self, form or self._to_push.get("form"), changed)
        for name in ("variant", "save_original_format") if form == "thin" else ():
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is for the forms that transformers loads by itself, and this save is thin")
        hub_kwargs = {name: kwargs.pop(name) for name in _PUSH_KWARGS if name in kwargs}
        if form == "full" and kwargs.get("save_original_format") and getattr(self.config, "lora_config", None):
            raise ValueError("save_original_format knows no names of weights under LoRA: save merged, or leave it out")
        with in_form(self, form, changed, state_dict) as arguments:
            if is_main_process:
                self._check_described(form, arguments["state_dict"], ties=state_dict is None)
                with written_whole(save_directory) as folder:
                    if self._processor is not None and not Path(save_directory, PROCESSOR_NAME).exists():
                        self._processor.save_pretrained(folder)
                    self._save_beside(folder, state_dict)
                    super().save_pretrained(folder, **kwargs | arguments)
            else:  # takes part in gathering the weights, and writes nothing
                super().save_pretrained(save_directory, is_main_process=False, **kwargs | arguments)
        if push_to_hub:  # a push of its own: transformers' would leave out what was written before its save
            repo_id = hub_kwargs.pop("repo_id", Path(save_directory).resolve().name)
            self.push_to_hub(repo_id, form=form, state_dict=state_dict, token=kwargs.get("token"), **hub_kwargs)

    def _check_described(self, form: str, weights: dict[str, torch.Tensor] | None, ties: bool) -> None:
        """Called with the config of a save and the weights that it is to write, None for all.

        Raises:
            ValueError: a model of that config has other weights, or none can be built; a reload would be another model.
        """
        config = copy.deepcopy(self.config)
        if thin := form == "thin":  # and its language model may be quantised
            getattr(config, "text_config", config).__dict__.pop("quantization_config", None)
        never_saved = keys_never_saved(self)

        def ignored(key: str) -> bool:
            return key in never_saved or is_unread(key) or (thin and is_backbone_key(self, key))

        weights = self.state_dict(keep_vars=True) if weights is None else weights
        weights = {key: value for key, value in weights.items() if not ignored(key)}
        try:
            found = difference(weights, without_weights(lambda: type(self)(config)), ignored, ties)
        except ValueError as error:
            text = getattr(config, "text_config", None)
            sizes = {name: getattr(text, name, None) for name in ("vocab_size", "pad_token_id")}
            found = f"{error}" + (f" (of its text_config: {sizes})" if text is not None else "")
        if found is not None:
            raise ValueError(
                f"This model cannot be saved {form}, for it is no longer what its config describes: {found}. Its "
                "reload would be another model: undo that, or change the config too (resize_token_embeddings does)"
            )

    def push_to_hub(
        self,
        repo_id: str,
        form: str | None = None,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> str:
        """As `PreTrainedModel.push_to_hub`, with a card that says what is known.

        `form` and `state_dict` are those of [`save_pretrained`].
        """
        self._to_push = {"form": form, "state_dict": state_dict}
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            del self._to_push

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any):
        """transformers' last step of a push: the card that it has put there is completed before."""
        path = Path(working_dir, "README.md")
        card = ModelCard.load(path, ignore_metadata_errors=True)
        complete_card(card, self.config, PreTrainedConfig.get_config_dict(working_dir)[0]["saved_form"])
        card.save(path)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _known_processor(self, otherwise: str = "pass processor=") -> Any:
        """The processor that the model was joined with or lay beside; `otherwise` says what to do without one.

        Raises:
            ValueError: none is known. OSError: the files beside the model do not make one.
        """
        if isinstance(self._processor, ProcessorBeside):
            try:
                return self._processor.load()
            except OSError as error:
                raise OSError(f"{error}; {otherwise}") from error
        if self._processor is None:
            raise ValueError(f"No processor is known to this model: {otherwise}")
        return self._processor

    def _save_beside(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write what belongs to a saved model besides config, weights and processor: nothing, for most."""

    @torch.no_grad()
    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """What the frozen ViT sees: `vision_feature_layer`, of all tokens or of the patches alone.

        Args:
            pixel_values: `(N, 3, H, W)`, or `(N, patches, values)` for SigLIP2's variable resolution.
            pixel_attention_mask: `(N, patches)`, SigLIP2 only.
            spatial_shapes: `(N, 2)` patches per side, SigLIP2 only.

        Returns:
            `last_hidden_state` `(N, L, E)`, without a graph; the ViT's `hidden_states` and `attentions` on request.
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
            features,
            hidden_states=outputs.hidden_states if wanted else None,
            attentions=outputs.attentions,
        )


__all__ = ["LorgnettePreTrainedModel"]
