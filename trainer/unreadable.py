"""Find rows with unreadable pictures by reading all pictures before training."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..assembly.conversations import messages_of
from ..processing.prompt_encoding import images_in
from .feature_cache import COLUMN


REPORT = "unreadable.json"
_SHOWN = 20  # in the log; the report lists all

logger = logging.getLogger(__name__)


def leave_out_unreadable(
    splits: Mapping[str, Dataset],
    image_column: str,
    load_image: Callable[[Any], Any],
    output_dir: str | Path,
    num_workers: int = 0,
) -> dict[str, Dataset]:
    """The splits without rows whose pictures cannot be read; each process checks its share.

    The rows left out are logged, and listed with the reasons in `output_dir/unreadable.json`.

    Args:
        splits: rows as [`~lorgnette.trainer.data.load_pairs`] gives them; the rows of a feature cache are not checked.
        load_image: the processor's; it raises for an unreadable picture.

    Raises:
        ValueError: no row of a split can be read.
    """
    state, found = PartialState(), {}
    for name, rows in splits.items():
        mine = rows.select(range(state.process_index, len(rows), state.num_processes), keep_in_memory=True)
        shares = gather_object([_reasons(mine, image_column, load_image, name, num_workers)])
        found[name] = {number: reason for share in shares for number, reason in share.items()}
        _check_some_are_left(found[name], len(rows), name)
    if state.is_main_process:
        report_unreadable(found, output_dir)
    kept = {}
    for name, rows in splits.items():
        numbers = rows.with_format(None)["index"][:]
        positions = [position for position, number in enumerate(numbers) if str(number) not in found[name]]
        kept[name] = rows.select(positions, keep_in_memory=True)  # the data set's folder may be read-only
    return kept


def find_unreadable(
    rows: Dataset, image_column: str, load_image: Callable[[Any], Any], name: str, num_workers: int = 0
) -> dict[str, str]:
    """Read the pictures of all rows; return the `index` of each unreadable one, and the reason.

    Raises:
        ValueError: no picture can be read.
        TypeError: a row's column does not hold a picture; names the row.
    """
    found = _reasons(rows, image_column, load_image, name, num_workers)
    _check_some_are_left(found, len(rows), name)
    return found


def _reasons(
    rows: Dataset, image_column: str, load_image: Callable[[Any], Any], name: str, num_workers: int
) -> dict[str, str]:
    if COLUMN in rows.column_names:
        return {}
    # batches lower the overhead of workers
    loader = DataLoader(
        _Reasons(rows, image_column, load_image), batch_size=32, num_workers=num_workers, collate_fn=list
    )
    numbers = iter(rows.with_format(None)["index"][:])
    found = {}
    with tqdm(total=len(rows), desc=f"reading the pictures of {name}", unit="row") as progress:
        for reasons in loader:
            found |= {str(next(numbers)): reason for reason in reasons}
            progress.update(len(reasons))
    return {number: reason for number, reason in found.items() if reason is not None}


def _check_some_are_left(found: dict[str, str], rows: int, name: str) -> None:
    if found and len(found) == rows:
        number, reason = next(iter(found.items()))
        raise ValueError(f"{name}: no picture of its {rows} rows can be read; row {number}: {reason}")


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
            logger.warning("%s: %d rows with unreadable pictures are left out: %s", name, len(reasons), rows)


class _Reasons:
    """For each row the reason why its pictures cannot be read, or None."""

    def __init__(self, rows: Dataset, image_column: str, load_image: Callable[[Any], Any]):
        self.rows, self.image_column, self.load_image = rows, image_column, load_image

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> str | None:
        try:
            row = self.rows[position]
            for picture in self._pictures(row):
                self.load_image(picture)
        except (OSError, ValueError) as error:
            return str(error)
        except TypeError as error:
            number = self.rows.with_format(None)["index"][position]
            raise TypeError(f"row {number}: {error}") from error
        return None

    def _pictures(self, row: dict[str, Any]) -> list[Any]:
        own = images_in(messages_of(row["messages"])) if row.get("messages") else []
        value = row.get(self.image_column)
        if value is None and row.get("messages"):
            return own  # a chat's column may be empty
        return own + (value if isinstance(value, list) else [value])
