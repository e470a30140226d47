"""Fingerprints of weights: of those in memory, and of a backbone's folder."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import CONFIG_NAME

from ..modeling.modeling_loading import weight_files
from ..modeling.modeling_saving import FINGERPRINT


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def folder_fingerprint(folder: str | Path) -> str:
    """`sha256:…` of a backbone's config and safetensors. It reads all of them.

    Raises:
        OSError: a file is missing.
    """
    digest = hashlib.sha256(Path(folder, CONFIG_NAME).read_bytes())
    with ThreadPoolExecutor(8) as threads:  # hashlib releases the GIL
        for file in weight_files(folder):
            tensors = sorted(load_file(file).items())
            for of_tensor in threads.map(lambda item: weights_sha256(dict([item])), tensors):
                digest.update(of_tensor.encode())
    return FINGERPRINT + digest.hexdigest()


__all__ = ["folder_fingerprint", "weights_sha256"]
