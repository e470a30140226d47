"""The processor beside a model: taken along when the model is saved, so that no saved folder is without one.

transformers saves a model and its processor apart, and a pipeline saves only parts of one. Whoever loads a model,
trains it and saves it would leave a folder that no pipeline loads.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.utils import (
    CHAT_TEMPLATE_DIR,
    CHAT_TEMPLATE_FILE,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import list_repo_templates


logger = logging.get_logger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
# Of the two tokenizers that a processor may have, the Q-Former's lies in a folder of its own.
_PROCESSOR_FILES = (
    PROCESSOR_NAME,
    IMAGE_PROCESSOR_NAME,
    CHAT_TEMPLATE_FILE,
    *_TOKENIZER_FILES,
    *(f"qformer_tokenizer/{name}" for name in _TOKENIZER_FILES),
)


class ProcessorBeside:
    """The processor's files that lie beside the weights of a loaded model.

    A local folder's are read at once, for it may be gone when the model is saved (Trainer deletes old checkpoints). A
    Hub repository's are fetched when they are needed.

    Args:
        name_or_path: Hub id or local folder.
        hub_kwargs: `revision`, `cache_dir`, `token`, `local_files_only` of the load.
    """

    def __init__(self, name_or_path: str | Path, **hub_kwargs: Any):
        self.name, self.hub_kwargs = str(name_or_path), hub_kwargs
        self.files: dict[str, bytes] | None = None
        self._loaded: Any = None
        folder = Path(name_or_path)
        if folder.is_dir():
            templates = [f"{CHAT_TEMPLATE_DIR}/{path.name}" for path in folder.glob(f"{CHAT_TEMPLATE_DIR}/*.jinja")]
            names = (*_PROCESSOR_FILES, *templates)
            self.files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files into `folder`; a Hub that cannot be reached is a warning, for weights may be at stake."""
        if self.files is None:
            try:
                self.files = self._fetch()
            except OSError as error:
                logger.warning(f"The processor of {self.name} is not saved along with the model: {error}")
                return
        for name, content in self.files.items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_bytes(content)

    def load(self) -> Any:
        """The processor itself, the same one each time; raises OSError where there is none.

        Its files may name code of others' for a tokenizer, say, which nobody has said is to be trusted: it is not run.
        """
        from ..processing.processing_lorgnette import LorgnetteProcessor  # needed here alone: models know of no other

        if self._loaded is None:
            with TemporaryDirectory() as folder:
                self.save_pretrained(folder)
                if not self.files:
                    raise OSError(f"No processor lies beside the weights of {self.name}")
                self._loaded = LorgnetteProcessor.from_pretrained(folder, trust_remote_code=False)
        return self._loaded

    def _fetch(self) -> dict[str, bytes]:
        def fetch(name: str) -> str | None:
            return cached_file(self.name, name, _raise_exceptions_for_missing_entries=False, **self.hub_kwargs)

        if fetch(PROCESSOR_NAME) is None:
            return {}
        templates = list_repo_templates(self.name, **{"local_files_only": False} | self.hub_kwargs)
        named = [f"{CHAT_TEMPLATE_DIR}/{template.removesuffix('.jinja')}.jinja" for template in templates]
        paths = {name: fetch(name) for name in (*_PROCESSOR_FILES, *named)}
        return {name: Path(path).read_bytes() for name, path in paths.items() if path is not None}


__all__ = ["ProcessorBeside"]
