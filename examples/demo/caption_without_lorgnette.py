"""Caption pictures with a saved model's folder and transformers, without lorgnette.

Usage: python -I caption_without_lorgnette.py MODEL_FOLDER PICTURE_FOLDER ANSWERS.json

Writes a JSON list of the answers to the folder's PNG files, in the order of their names.
"""

import json
import logging
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


BATCH = 8


class WithoutLorgnette(MetaPathFinder):
    """Makes imports of lorgnette fail in this interpreter."""

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name.partition(".")[0] == "lorgnette":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(model: str, pictures: str, answers: str) -> None:
    sys.meta_path.insert(0, WithoutLorgnette())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it misses a package for what is not used here

    from tqdm import tqdm
    from transformers import pipeline

    captioner = pipeline("image-to-text", model=model, trust_remote_code=True)
    paths = sorted(str(path) for path in Path(pictures).glob("*.png"))
    texts = []
    for start in tqdm(range(0, len(paths), BATCH), desc="captioning", unit="batch", disable=None):
        outputs = captioner(paths[start : start + BATCH], batch_size=BATCH, generate_kwargs={"max_new_tokens": 8})
        texts += [output[0]["generated_text"] for output in outputs]

    if "lorgnette" in sys.modules:
        raise RuntimeError("lorgnette was imported: this process proves nothing")
    Path(answers).write_text(json.dumps(texts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
