"""The frozen ViT alone, and its features of a data set's pictures as bytes."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..assembly.backbones import load_vision_model
from ..assembly.sources import from_pretrained_arguments
from ..configuration.configuration_lorgnette import LorgnetteBridgeConfig, LorgnetteConfig
from ..configuration.configuration_retrieval import LorgnetteRetrievalConfig
from ..modeling.modeling_base import LorgnettePreTrainedModel
from ..modeling.modeling_loading import vision_model_class
from ..processing.image_loading import load_image_for
from ..processing.prompt_encoding import error_context
from .arguments import VisionArguments


class VisionTower(LorgnettePreTrainedModel):
    """The ViT alone. From a saved model of either stage it loads only the ViT."""

    _keys_to_ignore_on_load_unexpected = (r"^(?!vision_model\.)",)

    def __init__(self, config: LorgnetteBridgeConfig, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        if vision_model is None:
            vision_model = vision_model_class(config.vision_config)._from_config(config.vision_config)
        self.vision_model = vision_model
        self.post_init()
        self.freeze()


def load_tower(args: VisionArguments) -> tuple[VisionTower, BaseImageProcessor]:
    """The frozen ViT that `args` name, in eval mode, and its image processor.

    Raises:
        OSError: it cannot be found.
        ValueError: `model` is not a lorgnette model, or `vision` is not a ViT.
    """
    if args.model is not None:
        name, keywords = from_pretrained_arguments(args.model, args.model_revision)
        config = _saved_config(name, **keywords)
        tower = VisionTower.from_pretrained(
            name, config=config, attn_implementation=args.attn_implementation, **keywords
        )
    else:
        name, keywords = from_pretrained_arguments(args.vision, args.vision_revision)
        backbone = load_vision_model(args.vision, args.vision_revision, None, args.attn_implementation)
        config = LorgnetteBridgeConfig(
            vision_config=backbone.model.config,
            vision_feature_layer=args.vision_feature_layer,
            vision_feature_select_strategy=args.vision_feature_select_strategy,
            attn_implementation=args.attn_implementation,
        )
        tower = VisionTower(config, backbone.model)
    return tower.eval(), AutoImageProcessor.from_pretrained(name, **keywords)


class FeatureEncoder:
    """Encode rows with pictures into the bytes of their features, `(L, E)` in `dtype`.

    Args:
        tower, image_processor: see [`load_tower`].
        dtype: of the stored features.
        batch_size: rows in a batch.
        num_workers: processes that decode pictures.

    Raises:
        ValueError: a ViT of variable resolution, whose features have masks of their own.
    """

    def __init__(
        self,
        tower: VisionTower,
        image_processor: BaseImageProcessor,
        dtype: torch.dtype,
        batch_size: int,
        num_workers: int = 0,
    ):
        self.tower, self.image_processor, self.dtype = tower, image_processor, dtype
        self.batch_size, self.num_workers = batch_size, num_workers
        inputs = image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")
        if masks := sorted({"pixel_attention_mask", "spatial_shapes"} & set(inputs)):
            raise ValueError(
                f"{tower.config.vision_config.model_type} takes pictures of variable resolution ({', '.join(masks)}); "
                "such features cannot be cached: train on the pictures"
            )
        self.shape = tuple(self._features(inputs).shape[1:])  # (L, E)

    @property
    def bytes_per_picture(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def __call__(self, rows: Dataset, image_column: str, progress: tqdm) -> Iterator[bytes | list[bytes]]:
        """The features of each row in turn: bytes, or a list of them where a row has a list of pictures.

        Args:
            rows: with `index`, and pictures as [`~lorgnette.trainer.data.picture_opener`] leaves them.
            progress: advances by one per row.

        Raises:
            OSError, TypeError, ValueError: a picture that cannot be read, or features that `dtype` cannot hold; each
                names the row.
        """
        loader = DataLoader(
            rows,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=partial(_preprocess, image_column=image_column, image_processor=self.image_processor),
        )
        for numbers, counts, inputs in loader:
            features = self._features(inputs)  # (N, L, E)
            self._check(features, [n for n, count in zip(numbers, counts, strict=True) for _ in range(count or 1)])
            stored = map(_bytes_of, features.to(self.dtype).cpu().contiguous())
            for count in counts:
                yield next(stored) if count is None else [next(stored) for _ in range(count)]
            progress.update(len(counts))

    def _features(self, inputs: BatchFeature) -> torch.Tensor:
        pixel_values = inputs["pixel_values"].to(self.tower.device)
        return self.tower.get_vision_features(pixel_values).last_hidden_state

    def _check(self, features: torch.Tensor, numbers: list[int]) -> None:
        shape = tuple(features.shape[1:])
        if shape != self.shape:
            raise ValueError(f"row {numbers[0]}: its features have the shape {shape}, others have {self.shape}")
        largest, limit = features.abs().flatten(1).amax(1), torch.finfo(self.dtype).max  # (N,), NaN where there is one
        for number, value in zip(numbers, largest.tolist(), strict=True):
            if not math.isfinite(value):
                raise ValueError(f"row {number}: the ViT's features are not all finite: NaN or infinity is among them")
            if value > limit:
                raise ValueError(
                    f"row {number}: its features go up to {value:g}, and {self.dtype} ends at {limit:g}; bfloat16 and "
                    "float32 go further"
                )


def _saved_config(name: str, **keywords: Any) -> LorgnetteBridgeConfig:
    kinds = {kind.model_type: kind for kind in (LorgnetteConfig, LorgnetteRetrievalConfig)}
    model_type = PreTrainedConfig.get_config_dict(name, **keywords)[0].get("model_type")
    if model_type not in kinds:
        raise ValueError(
            f"model {name!r} is a {model_type} model, not one of {', '.join(kinds)}: name a ViT in `vision`"
        )
    return kinds[model_type].from_pretrained(name, **keywords)


def pictures_in(row: dict[str, Any], image_column: str) -> list[Any]:
    """The pictures of a row, whether its column holds one or a list of them.

    Raises:
        ValueError: an empty list.
    """
    value = row[image_column]
    if not isinstance(value, list):
        return [value]
    if not value:
        raise ValueError(f"column {image_column!r} is an empty list")
    return value


def _preprocess(
    rows: list[dict[str, Any]], image_column: str, image_processor: BaseImageProcessor
) -> tuple[list[int], list[int | None], BatchFeature]:
    """The rows' numbers, their picture counts (None for a single picture outside a list), and the ViT's inputs."""
    counts, images = [], []
    for row in rows:
        with error_context(f"row {row['index']}"):
            pictures = pictures_in(row, image_column)
            images += [load_image_for(image_processor, picture) for picture in pictures]
        counts.append(len(pictures) if isinstance(row[image_column], list) else None)
    return [row["index"] for row in rows], counts, image_processor(images, return_tensors="pt")


def _bytes_of(features: torch.Tensor) -> bytes:
    return features.view(torch.uint8).numpy().tobytes()
