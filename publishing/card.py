"""Fills `model_card.md` for a model from its config, its parts and what was recorded of it."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from ..modeling.modeling_base import LorgnettePreTrainedModel
from ..processing.processing_lorgnette import LorgnetteProcessor
from .records import Result, datasets_of, results_of, training_of


TEMPLATE = Path(__file__).parents[1] / "model_card.md"

# submodule -> what the card calls it, and the prefix of the config's fields about it
_PARTS = {
    "vision_model": ("frozen ViT", "vision"),
    "qformer": ("Q-Former", "qformer"),
    "projector": ("projector", None),
    "language_model": ("frozen causal LM", "text"),
}
# Stage 1 scores texts for a picture, which is what that task asks for.
_TASKS = {"lorgnette": "image-text-to-text", "lorgnette_retrieval": "zero-shot-image-classification"}


def make_card(
    model: LorgnettePreTrainedModel,
    processor: LorgnetteProcessor,
    repo_id: str,
    source: str | Path,
    *,
    license: str | None = None,
    metrics: tuple[str | Path, ...] = (),
    form: str = "full",
) -> ModelCard:
    """The card of a model that is to be published as `repo_id`.

    Args:
        source: the folder that the model was loaded from; what Trainer left there is told.
        license: of the Hub's identifiers; by default the one that the backbones' cards agree on.
        metrics: `metrics.json` files of `lorgnette.trainer evaluate` or `retrieval`.
        form: what the exported folder holds.

    Raises:
        ValueError: no licence was given and the backbones' are unknown or differ; metrics of another model.
        FileNotFoundError: no such metrics.
    """
    config, task = model.config, _TASKS[model.config.model_type]
    results = [result for path in metrics for result in results_of(path, source, repo_id)]
    backbones = list(dict.fromkeys(name for name, _ in backbones_of(config)))
    data = ModelCardData(
        license=license or license_of(config),
        library_name="transformers",
        pipeline_tag=task,
        base_model=backbones or None,
        base_model_relation=("adapter" if form == "thin" else "finetune") if backbones else None,
        datasets=datasets_of(source) or None,
        metrics=list(dict.fromkeys(result.metric for result in results)) or None,
        tags=["lorgnette", "q-former"],
        model_name=repo_id.split("/")[-1],
        eval_results=[_as_eval_result(result, task) for result in results] or None,
    )
    if data.eval_results is None:
        del data.model_name  # a field of the model-index alone
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        stage=1 if task != _TASKS["lorgnette"] else 2,
        form=form,
        parts=parts_of(model),
        num_query_tokens=config.num_query_tokens,
        lora=getattr(config, "lora_config", None),
        query=processor.query,
        reads_query=config.qformer_config.use_qformer_text_input,
        training=training_of(source),
        results=results,
    )


def backbones_of(config: Any) -> list[tuple[str, str | None]]:
    """Hub id and commit of each part that came from the Hub."""
    fields = [(getattr(config, f"{part}_backbone", None), part) for part in ("vision", "text", "qformer")]
    return [(name, getattr(config, f"{part}_backbone_revision")) for name, part in fields if name]


def license_of(config: Any) -> str:
    """The licence that the cards of the backbones agree on.

    Raises:
        ValueError: a frozen backbone did not come from the Hub, a card has no licence or one of its own, two differ.
    """
    ask = "say under which licence the model may be used (license=, --license)"
    for part, what in (("vision", "ViT"), ("text", "language model")):
        if hasattr(config, f"{part}_config") and getattr(config, f"{part}_backbone", None) is None:
            raise ValueError(f"The {what} came from a folder, and its licence is not known: {ask}")
    found = {name: _license_on_hub(name, revision) for name, revision in backbones_of(config)}
    said = ", ".join(f"{name}: {license or 'none that is known'}" for name, license in found.items())
    if len(set(found.values())) > 1 or {None, "other"} & set(found.values()):
        raise ValueError(f"The licences of the backbones do not settle the model's ({said}): {ask}")
    return next(iter(found.values()))


def parts_of(model: LorgnettePreTrainedModel) -> list[dict[str, Any]]:
    """Of each part its role, origin, architecture and numbers of weights: all, and those that trained."""
    parts = []
    for name, (role, prefix) in _PARTS.items():
        module = getattr(model, name, None)
        if module is None:
            continue
        if name == "language_model" and getattr(model.config, "lora_config", None):
            role += " with LoRA"
        weights = {id(p): (p.numel(), p.requires_grad) for p in module.parameters()}.values()
        parts.append(
            {
                "role": role,
                "source": getattr(model.config, f"{prefix}_backbone", None),
                "revision": getattr(model.config, f"{prefix}_backbone_revision", None),
                "architecture": type(module).__name__.removeprefix("Lorgnette"),
                "weights": sum(number for number, _ in weights),
                "trained": sum(number for number, trains in weights if trains),
            }
        )
    return parts


def _license_on_hub(name: str, revision: str | None) -> str | None:
    """What a repository's card says, from the cache where the Hub cannot be reached; None where it says nothing."""
    try:
        card = hf_hub_download(name, "README.md", revision=revision)
    except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError):
        return None
    license = ModelCard.load(Path(card), ignore_metadata_errors=True).data.license
    return license if isinstance(license, str) else None


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
