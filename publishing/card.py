"""Fill `model_card.md` from a model's config, its parts and its training records."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..assembly.card_metadata import card_metadata, hub_source, license_of
from ..assembly.endpoint import REQUIREMENTS
from ..configuration.configuration_lorgnette import LorgnetteConfig
from ..modeling.modeling_base import LorgnettePreTrainedModel
from ..processing.processing_lorgnette import LorgnetteProcessor
from .records import Result, datasets_of, results_of, training_of


logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parents[1] / "model_card.md"

# submodule -> its name in the card, and the prefix of its config fields
_PARTS = {
    "vision_model": ("frozen ViT", "vision"),
    "qformer": ("Q-Former", "qformer"),
    "projector": ("projector", None),
    "language_model": ("frozen causal LM", "text"),
}


def make_card(
    model: LorgnettePreTrainedModel,
    processor: LorgnetteProcessor,
    repo_id: str,
    source: str | Path,
    *,
    license: str | None = None,
    needs_license: bool = True,
    metrics: tuple[str | Path, ...] = (),
    save_format: str = "full",
) -> ModelCard:
    """The card of a model for `repo_id`.

    Args:
        source: the folder that the model was loaded from; the card reports Trainer's records there.
        license: one of the Hub's identifiers; by default the one that the backbones' cards agree on.
        needs_license: False for a card that stays here: without a known licence it has none, which is a warning.
        metrics: `metrics.json` files of `lorgnette.trainer evaluate` or `retrieval`.
        save_format: of the exported folder.

    Raises:
        ValueError: no licence was given, it is needed, and the backbones' are unknown or differ; metrics of another
            model.
        FileNotFoundError: a metrics file does not exist.
    """
    config, name = model.config, repo_id.split("/")[-1]
    if not license:
        try:
            license = license_of(config)
        except ValueError as error:
            if needs_license:
                raise
            logger.warning("The card names no licence, which a push needs. %s", error)
    metadata = card_metadata(config, save_format)
    task = metadata["pipeline_tag"]
    lora = save_format != "merged" and bool(getattr(config, "lora_config", None))
    results = [result for path in metrics for result in results_of(path, source)]
    index = {"model_name": name, "eval_results": [_as_eval_result(result, task) for result in results]}
    data = ModelCardData(
        license=license,
        **metadata,
        datasets=datasets_of(source) or None,
        metrics=list(dict.fromkeys(result.metric for result in results)) or None,
        **(index if results else {}),
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        name=name,
        stage=2 if config.model_type == LorgnetteConfig.model_type else 1,
        save_format=save_format,
        parts=parts_of(model, lora),
        num_query_tokens=config.num_query_tokens,
        lora=lora,
        requirements=[line for line in REQUIREMENTS if lora or not line.startswith("peft")],
        query=repr(processor.query),  # a Python literal, for the code example
        reads_query=config.qformer_config.use_qformer_text_input,
        training=training_of(source),
        results=results,
    )


def parts_of(model: LorgnettePreTrainedModel, lora: bool) -> list[dict[str, Any]]:
    """Each part's role, origin, architecture, and numbers of all and of trained weights.

    Args:
        lora: whether the export has separate LoRA weights.
    """
    parts = []
    for name, (role, prefix) in _PARTS.items():
        module = getattr(model, name, None)
        if module is None:
            continue
        if name == "language_model" and lora:
            role += " with LoRA"
        parameters = [weight for key, weight in module.named_parameters() if lora or ".lora_" not in key]
        part = {
            "role": role,
            "architecture": type(module).__name__.removeprefix("Lorgnette"),
            "weights": sum(weight.numel() for weight in parameters),
            "trained": sum(weight.numel() for weight in parameters if weight.requires_grad),
        }
        if prefix is not None:
            part["source"], part["revision"] = hub_source(model.config, prefix)
        parts.append(part)
    return parts


def _as_eval_result(result: Result, task: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=result.dataset_id or result.dataset,
        dataset_name=result.dataset,
        dataset_config=result.dataset_config,
        dataset_revision=result.dataset_revision,
        dataset_split=result.split,
        metric_type=result.metric,
        metric_name=f"{result.figure}, {result.how}",
        metric_value=round(result.value, 6),
    )
