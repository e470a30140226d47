"""`model.push_to_hub`: a save of the model with its card and the Endpoint's files, in one commit."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import create_and_tag_model_card

from ..assembly.card_metadata import complete_card
from ..assembly.endpoint import write_endpoint


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    save_format: str | None = None,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Like `PushToHubMixin.push_to_hub` (`transformers/utils/hub.py`), with a card filled from the config.

    Args:
        save_format, state_dict: see [`~LorgnettePreTrainedModel.save_pretrained`].
        commit_message, commit_description, private, token, revision, create_pr, max_shard_size, tags: transformers'.
    """
    if "form" in kwargs:  # its name before save_format
        save_format = kwargs.pop("form")
    if kwargs:
        raise TypeError(f"push_to_hub takes no {', '.join(kwargs)}")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    card = create_and_tag_model_card(repo_id, [*model.model_tags, *(tags or ())], token=token)
    with TemporaryDirectory() as scratch:
        model.save_pretrained(
            scratch, state_dict=state_dict, save_format=save_format, max_shard_size=max_shard_size, token=token
        )
        if model.can_generate():
            write_endpoint(scratch)
        complete_card(card, model.config, PreTrainedConfig.get_config_dict(scratch)[0]["saved_form"])
        card.save(Path(scratch, "README.md"))
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=scratch,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


__all__ = ["push_model"]
