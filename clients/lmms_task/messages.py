"""A row of the task in lmms-eval's format."""

from typing import Any


def pictures_of(row: dict[str, Any]) -> list[Any]:
    return [row["image"].convert("RGB")]


def question_of(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return row["question"]


def messages_of(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": row["image"].convert("RGB")}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": content}]
