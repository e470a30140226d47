"""How a model is saved: in which format, whole or not at all, with its processor and its code.

| format   | in the folder                                                      | loading it needs             |
|----------|--------------------------------------------------------------------|------------------------------|
| `thin`   | what trains; of the backbones their Hub ids and commits            | the backbones from the Hub   |
| `full`   | everything                                                         | nothing else                 |
| `merged` | everything, LoRA merged into the language model, which is plain    | nothing else, not even peft  |
"""

import copy
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import filter_repo_objects
from torch import nn
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, logging

from ..configuration.configuration_lorgnette import CODE, IN_PACKAGE, SAVE_FORMATS, from_package


logger = logging.get_logger(__name__)

# A submodule that is a backbone -> its name in errors, and the prefix of the config's fields about it.
BACKBONES = {"language_model": ("language model", "text"), "vision_model": ("ViT", "vision")}
FINGERPRINT = "sha256:"  # in place of a commit: the backbone is read from a local folder, by a checkpoint of training
ADAPTER = "default"  # peft's name of the adapter that a model is loaded and saved with
_PUSH_KWARGS = ("repo_id", "commit_message", "commit_description", "private", "create_pr")


def without_lora(key: str) -> str:
    """The name that a base weight under LoRA has in the language model alone."""
    return key.replace(".base_layer", "")


def is_backbone_key(model: PreTrainedModel | type[PreTrainedModel], key: str) -> bool:
    """Whether a weight of this name comes with a backbone."""
    return key.split(".", 1)[0] in model.backbones and ".lora_" not in key


def keys_never_saved(model: PreTrainedModel) -> set[str]:
    """What the parts themselves leave out of any save, by its name in the whole."""
    return {
        f"{name}.{key}"
        for name, part in model.named_children()
        for key in getattr(part, "_keys_to_ignore_on_save", None) or ()
    }


def keys_to_ignore_on_save(model: PreTrainedModel) -> set[str]:
    """`_keys_to_ignore_on_save`: Trainer does not warn that a checkpoint lacks exactly these when it restores it."""
    left_out = () if why_not_thin(model, []) else model.state_dict()
    return keys_never_saved(model) | {key for key in left_out if is_backbone_key(model, key)}


def backbone_checksums(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """A checksum of each backbone weight by its name without LoRA; of none that is offloaded, sharded or packed."""
    plain = {
        without_lora(key): value.data
        for key, value in weights.items()
        if is_backbone_key(model, key) and type(value) in (torch.Tensor, nn.Parameter)
        if value.is_floating_point() and not value.is_meta
    }
    tied = {key: (value.data_ptr(), value.shape, value.stride(), value.dtype) for key, value in plain.items()}
    once = {tied[key]: value for key, value in plain.items()}
    with ThreadPoolExecutor(8) as threads:
        checksums = dict(zip(once, threads.map(checksum, once.values()), strict=True))
    return {key: checksums[tied[key]] for key in plain}


def checksum(tensor: torch.Tensor) -> int:
    # CRC-32 of blocks' sums of rows and of columns: they depend on the order of the numbers, and are quick to read
    data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    end, crc = len(data) - len(data) % 8192, 0
    if end:
        for block in torch.frombuffer(data, dtype=torch.int64, count=end // 8).view(-1, 1024).split(128):
            crc = zlib.crc32(block.sum(1).numpy(), zlib.crc32(block.sum(0).numpy(), crc))
    return zlib.crc32(data[end:], crc)


def changed_backbone_weights(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None) -> list[str]:
    """The weights of backbones that were loaded otherwise, or are gone; `state_dict` is one gathered from devices."""
    if not (loaded := model._backbone_checksums):
        return []
    now = backbone_checksums(model, model.state_dict() if state_dict is None else state_dict)
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    present = {without_lora(key) for key in (*now, *(state_dict or ()), *(key for key, _ in named))}
    changed = [key for key, checksum in now.items() if loaded.get(key) != checksum]
    return changed + [key for key in loaded if key not in present]


def quantizer_of(model: PreTrainedModel) -> Any:
    """transformers' quantizer of the language model, where it was loaded with one."""
    return getattr(getattr(model, "language_model", None), "hf_quantizer", None)


def resolve_save_format(model: PreTrainedModel, save_format: str | None, changed: list[str] | None = None) -> str:
    """The format of a save where `save_format`, or None, is asked for; a ValueError where it cannot hold the model."""
    if save_format is not None and save_format not in SAVE_FORMATS:
        raise ValueError(f"save_format is {save_format!r}; a model is saved as {', '.join(SAVE_FORMATS)}")
    lost = sorted(set(getattr(getattr(model, "language_model", None), "peft_config", ())) - {ADAPTER})
    if lost:
        raise ValueError(f"Adapters {lost} of the language model are not in lora_config, and would be lost")
    if IN_PACKAGE:
        from_package("assembly.offloading", "").refuse_offloaded(model)
    obstacle = why_not_thin(model, changed_backbone_weights(model, None) if changed is None else changed)
    if save_format == "thin" and obstacle:
        raise ValueError(f"This model cannot be saved thin: {obstacle}")
    if save_format == "thin" or (save_format is None and not obstacle):
        return "thin"
    if (quantizer := quantizer_of(model)) is not None:
        why = f", and {obstacle}. Give from_backbones a Hub id, or no quantization_config" if obstacle else ""
        method = quantizer.quantization_config.quant_method
        raise ValueError(f"The language model is quantised ({method}): only the thin format can be saved{why}")
    if model.config.saved_form == "merged" and model.config.lora_config is None:
        return "merged"
    if save_format == "merged" and getattr(model.config, "lora_config", None) is None:
        raise ValueError("This model has no LoRA to merge: save it full")
    if save_format is None:
        logger.info_once(f"Models are saved in full, with all weights of their backbones: {obstacle}")
    return save_format or "full"


def why_not_thin(model: PreTrainedModel, changed: list[str]) -> str | None:
    """Why a model cannot be saved without its backbones, or None; see [`resolve_save_format`]."""
    config = model.config
    if config.saved_form == "merged":
        return f"LoRA is merged into its language model, which is no longer {config.text_backbone or 'what it was'}"
    for name in model.backbones:
        what, prefix = BACKBONES[name]
        source, revision = (getattr(config, f"{prefix}_backbone{of}") for of in ("", "_revision"))
        if None in (source, revision) or (revision.startswith(FINGERPRINT) and not model._may_name_folders):
            return f"its {what} comes from a folder or from memory, not from a Hub repository at a commit"
        if not model.has_loaded_backbones:
            return f"its {what} is random, and not what {source} holds"
    if trained := _trained_backbone_weights(model):
        return f"{len(trained)} weights of its backbones train ({trained[0]}, …)"
    if changed:
        return f"{len(changed)} weights of its backbones are no longer those that were loaded ({changed[0]}, …)"
    return None


def _trained_backbone_weights(model: PreTrainedModel) -> list[str]:
    return [key for key, value in model.named_parameters() if value.requires_grad and is_backbone_key(model, key)]


def save(
    model: PreTrainedModel,
    save_pretrained: Callable,
    save_directory: str | Path,
    save_format: str | None,
    **kwargs: Any,
) -> None:
    """What [`~LorgnettePreTrainedModel.save_pretrained`] does; `save_pretrained` is transformers' own."""
    state_dict, is_main_process, push_to_hub = (kwargs.pop(n) for n in ("state_dict", "is_main_process", "push_to_hub"))
    if isinstance(model._processor, ProcessorMixin):  # it may have new tokens
        model.check_processor(model._processor)
    changed = changed_backbone_weights(model, state_dict)
    save_format = resolve_save_format(model, save_format, changed)
    if IN_PACKAGE:
        from_package("assembly.structure", "").check_save_keywords(model, save_format, kwargs)
    push_kwargs = {name: kwargs.pop(name) for name in _PUSH_KWARGS if name in kwargs}
    with _config_and_weights(model, save_format, changed, state_dict) as arguments:
        if is_main_process:
            if IN_PACKAGE:
                structure = from_package("assembly.structure", "")
                structure.check_described(model, save_format, arguments["state_dict"], ties=state_dict is None)
            with atomic_directory(save_directory) as folder:
                if model._processor is not None and not Path(save_directory, PROCESSOR_NAME).exists():
                    model._processor.save_pretrained(folder)
                if IN_PACKAGE and getattr(model.config, "lora_config", None):
                    from_package("assembly.foreign_adapters", "").save_lm_adapter(model, folder, state_dict)
                save_pretrained(folder, **kwargs | arguments)
        else:  # takes part in gathering the weights, and writes nothing
            save_pretrained(save_directory, is_main_process=False, **kwargs | arguments)
    if push_to_hub:  # a push of its own: transformers' leaves out what was written before its save
        push_kwargs |= {"save_format": save_format, "state_dict": state_dict, "token": kwargs.get("token")}
        model.push_to_hub(push_kwargs.pop("repo_id", Path(save_directory).resolve().name), **push_kwargs)


@contextmanager
def _config_and_weights(
    model: PreTrainedModel, save_format: str, changed: list[str], state_dict: dict[str, torch.Tensor] | None
) -> Iterator[dict[str, Any]]:
    """Within the block `model.config` and `_keys_to_ignore_on_save` are those of the save; yields its arguments."""
    config, ignored = model.config, model._keys_to_ignore_on_save
    # the backbones that are no longer what the config names
    others = {key.split(".", 1)[0] for key in (*_trained_backbone_weights(model), *changed)}
    if config.saved_form == "merged" and save_format != "merged":  # there is new LoRA over what was merged
        others.add("language_model")
    model.config, model._keys_to_ignore_on_save = copy.deepcopy(config), keys_never_saved(model)
    model.config.saved_form = save_format
    for part in model.backbones:
        prefix = BACKBONES[part][1]
        local = str(getattr(config, f"{prefix}_backbone_revision")).startswith(FINGERPRINT)
        if part in others or not model.has_loaded_backbones or (local and save_format != "thin"):
            model.config.update({f"{prefix}_backbone": None, f"{prefix}_backbone_revision": None})
        # a path of this machine is not published
        getattr(model.config, f"{prefix}_config").name_or_path = getattr(model.config, f"{prefix}_backbone") or ""
    # a copy: transformers takes out what it has written, and a push writes twice
    arguments: dict[str, Any] = {"state_dict": None if state_dict is None else dict(state_dict)}
    try:
        if save_format == "thin":
            weights = model.state_dict() if state_dict is None else state_dict
            arguments["state_dict"] = {key: weights[key] for key in weights if not is_backbone_key(model, key)}
            arguments["save_original_format"] = False  # names as in memory: `load_state_dict` reads them
            if quantizer_of(model) is not None and not quantizer_of(model).pre_quantized:
                del model.config.text_config.quantization_config  # of this process' load, not of the model
        elif save_format == "merged" and config.lora_config is not None:
            arguments["state_dict"] = from_package("assembly.merging", "Merging LoRA").merge_lora(model)
            model.config.lora_config = None
        elif getattr(config, "lora_config", None) is not None:
            arguments["save_original_format"] = False  # it has no names for weights under LoRA
        yield arguments
    finally:
        model.config, model._keys_to_ignore_on_save = config, ignored


_UNFINISHED = ".unfinished"
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "lm_adapter/adapter_*")


@contextmanager
def atomic_directory(folder: str | Path) -> Iterator[Path]:
    """A place to write into; when the block ends without an error its files go into `folder`.

    Files of the same names are replaced, weights of an older save are removed, and other files stay.
    """
    unfinished = Path(folder, _UNFINISHED)  # inside: on the same disk, whatever is mounted
    folder = unfinished.parent
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        files = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
        # A process that is killed between two of these steps leaves a folder without a config, which is no model.
        files.sort(key=lambda file: str(file) == CONFIG_NAME)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        # transformers would read older shards in place of the new ones, and peft an older LoRA
        for stale in {path for pattern in _WEIGHTS for path in folder.glob(pattern)}:
            if stale.relative_to(folder) not in files:
                stale.unlink()
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished / file, folder / file)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# Of a folder or a Hub repository: a processor's files, beside those of the code
_PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("*tokenizer.json", "*tokenizer_config.json", "*special_tokens_map.json", "*added_tokens.json", "*vocab.json"),
    *("*merges.txt", "*vocab.txt", "*tokenizer.model", "*spiece.model"),  # the Q-Former's, too, in qformer_tokenizer/
)


class BundledProcessor:
    """The files of a processor, and of code, that lie beside the weights of a loaded model: a save writes them too.

    A local folder's are read at once, since Trainer deletes old checkpoints; a Hub repository's when they are needed.
    """

    def __init__(self, name_or_path: str | Path, model_type: str, **hub_kwargs: Any):
        self.name, self.hub_kwargs = str(name_or_path), hub_kwargs
        self._patterns = [*_PROCESSOR_FILES, *(f"{module}.py" for module in CODE.get(model_type, ()))]
        self._loaded: Any = None
        self.files = self._read(Path(name_or_path)) if Path(name_or_path).is_dir() else None

    def _read(self, folder: Path) -> dict[str, bytes]:
        paths = (path for path in folder.glob("*") if path.is_file())
        paths = (*paths, *folder.glob("qformer_tokenizer/*"), *folder.glob(_PROCESSOR_FILES[3]))
        names = filter_repo_objects((str(path.relative_to(folder)) for path in paths), allow_patterns=self._patterns)
        return {name: (folder / name).read_bytes() for name in names}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files into `folder`; a Hub that cannot be reached is a warning, so that the weights are saved."""
        if self.files is None:
            try:
                snapshot = snapshot_download(self.name, allow_patterns=self._patterns, **self.hub_kwargs)
                self.files = self._read(Path(snapshot))
            except OSError as error:
                logger.warning(f"The processor of {self.name} is not saved along with the model: {error}")
                return
        for name, content in self.files.items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_bytes(content)

    def load(self) -> Any:
        """The processor, the same object each time; an OSError where the files make none. Their own code is not run."""
        from ..processing.processing_lorgnette import LorgnetteProcessor  # here alone: models need no processor

        if self._loaded is None:
            with TemporaryDirectory() as folder:
                self.save_pretrained(folder)
                if PROCESSOR_NAME not in (self.files or ()):
                    raise OSError(f"No processor lies beside the weights of {self.name}")
                self._loaded = LorgnetteProcessor.from_pretrained(folder, trust_remote_code=False)
        return self._loaded
