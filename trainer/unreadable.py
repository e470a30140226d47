"""Find rows with unreadable pictures and empty texts by reading all rows first."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..assembly.conversations import messages_of
from ..processing.prompt_encoding import images_in, parts_of
from .feature_cache import COLUMN


REPORT = "unreadable.json"
CHECK_REPORT = "check.json"  # of a dry run
EMPTY = "the text is empty"
_SHOWN = 20  # in the log; the report lists all

logger = logging.getLogger(__name__)


def leave_out_unreadable(
    splits: Mapping[str, Dataset],
    image_column: str,
    load_image: Callable[[Any], Any],
    output_dir: str | Path,
    text_column: str,
    num_workers: int = 0,
) -> dict[str, Dataset]:
    """The splits without rows whose pictures cannot be read or whose text is empty; each process checks its share.

    The rows left out are logged, and listed with the reasons in `output_dir/unreadable.json`.

    Args:
        splits: rows as [`~lorgnette.trainer.data.load_pairs`] or `load_rows` gives them; a feature cache has no
            pictures to read.
        load_image: the processor's; it raises for an unreadable picture.
        text_column: column with a text, with a list of texts, or `messages`.

    Raises:
        ValueError: no row of a split can be read.
    """
    state, found, kept = PartialState(), {}, {}
    reason = _Reason(image_column, load_image, text_column)
    for name, rows in splits.items():
        mine = range(state.process_index, len(rows), state.num_processes)
        reasons = _reasons(rows.select(mine, keep_in_memory=True), reason, name, num_workers)
        shares = gather_object([{mine[position]: text for position, text in reasons.items()}])
        reasons = {position: text for share in shares for position, text in share.items()}
        numbers = rows.with_format(None)["index"][:]
        found[name] = {str(numbers[position]): reasons[position] for position in sorted(reasons)}
        _check_some_are_left(found[name], len(rows) - len(reasons), name)
        kept[name] = without(rows, reasons)
    if state.is_main_process:
        report_unreadable(found, output_dir)
    return kept


def without(rows: Dataset, positions: Iterable[int]) -> Dataset:
    """The rows except those at `positions`."""
    left_out = set(positions)
    kept = [position for position in range(len(rows)) if position not in left_out]
    return rows.select(kept, keep_in_memory=True)  # the data set's folder may be read-only


def find_unreadable(
    rows: Dataset, image_column: str, load_image: Callable[[Any], Any], name: str, num_workers: int = 0
) -> dict[str, str]:
    """Read the pictures of all rows, and no texts; return the `index` of each unreadable one, and the reason.

    Raises:
        ValueError: no picture can be read.
        TypeError: a row's column does not hold a picture; names the row.
    """
    reasons = _reasons(rows, _Reason(image_column, load_image), name, num_workers)
    numbers = rows.with_format(None)["index"][:]
    found = {str(numbers[position]): reason for position, reason in reasons.items()}
    _check_some_are_left(found, len(rows) - len(reasons), name)
    return found


def read_all(
    rows: Dataset, find: Callable[[Callable[[], dict[str, Any]]], Any], description: str, num_workers: int = 0
) -> dict[int, Any]:
    """Read all rows once, in `num_workers` processes; return what is found in a row, by the row's position.

    Args:
        find: called for each row with a function that reads it; returns None if there is nothing to tell.

    Raises:
        TypeError: as `find` raises it; names the row.
    """
    # batches lower the overhead of workers
    loader = DataLoader(_Findings(rows, find), batch_size=32, num_workers=num_workers, collate_fn=list)
    found: dict[int, Any] = {}
    with tqdm(total=len(rows), desc=description, unit="row") as progress:
        for findings in loader:
            for finding in findings:
                if finding is not None:
                    found[progress.n] = finding
                progress.update()
    return found


def _reasons(rows: Dataset, reason: "_Reason", name: str, num_workers: int) -> dict[int, str]:
    if COLUMN in rows.column_names and reason.text_column is None:
        return {}
    return read_all(rows, reason, f"reading the pictures of {name}", num_workers)


def _check_some_are_left(found: dict[str, str], left: int, name: str) -> None:
    if found and not left:
        number, reason = next(iter(found.items()))
        raise ValueError(f"{name}: none of its {len(found)} rows can be read; row {number}: {reason}")


def report_unreadable(found: dict[str, dict[str, str]], output_dir: str | Path) -> None:
    """Log and save, for each split, the rows left out and the reasons."""
    path = Path(output_dir) / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2), encoding="utf-8")
    for name, reasons in found.items():
        if reasons:
            shown = [f"{number} ({reason})" for number, reason in list(reasons.items())[:_SHOWN]]
            more = f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
            rows = f"{', '.join(shown)}{more}; see {path}"
            logger.warning("%s: %d rows that cannot be read are left out: %s", name, len(reasons), rows)


class _Findings:
    """For each row what `find` finds in it, or None."""

    def __init__(self, rows: Dataset, find: Callable[[Callable[[], dict[str, Any]]], Any]):
        self.rows, self.find = rows, find

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        try:
            return self.find(lambda: self.rows[position])
        except TypeError as error:
            number = self.rows.with_format(None)["index"][position]
            raise TypeError(f"row {number}: {error}") from error


class _Reason:
    """Why a row's pictures cannot be read, or that its text is empty; None for a row that is left in."""

    def __init__(self, image_column: str, load_image: Callable[[Any], Any], text_column: str | None = None):
        self.image_column, self.load_image, self.text_column = image_column, load_image, text_column

    def __call__(self, read: Callable[[], dict[str, Any]]) -> str | None:
        try:
            row = read()
            if self.text_column is not None and (reason := why_empty(row.get(self.text_column))):
                return reason
            for picture in self._pictures(row):
                self.load_image(picture)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _pictures(self, row: dict[str, Any]) -> list[Any]:
        if COLUMN in row:
            return []
        own = images_in(messages_of(row["messages"])) if row.get("messages") else []
        value = row.get(self.image_column)
        if value is None and row.get("messages"):
            return own  # a chat's column may be empty
        return own + (value if isinstance(value, list) else [value])


def why_empty(text: Any) -> str | None:
    """What is nothing but white space: a text, one of several, or the last message of a chat; None if nothing is."""
    if isinstance(text, list) and text and not isinstance(text[0], dict):
        places = [place for place, each in enumerate(text) if why_empty(each)]
        return f"text {places[0]} of {len(text)} is empty" if places else None
    if isinstance(text, list) and text:
        text = "".join(part.get("text") or "<image>" for part in parts_of(messages_of(text)[-1]))
    return EMPTY if text is None or text == [] or (isinstance(text, str) and not text.strip()) else None
