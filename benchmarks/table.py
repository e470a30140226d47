"""The benchmark's table, as Markdown, JSON and chart."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot: no window, whatever the machine


MET, MISSED, OPEN = "#1a7f37", "#c4320a", "#57606a"


@dataclass
class Row:
    """One path's figures.

    Args:
        path: the quantity, with its unit.
        ours, theirs: medians; theirs None without a comparison.
        ratios: ours over theirs, of each pair of runs; may be empty.
        more_is_better: whether a ratio above the goal meets it; else one below.
        goal: for the ratio, or without ratios for ours; may be None.
        bound: the ratio, if ours and theirs reach the same share of the machine; None where it is not countable.
        reached: fraction of the machine's peak rate that ours reaches; may be None.
        not_run: why there are no figures.
    """

    path: str
    ours: float | None = None
    theirs: float | None = None
    ratios: Sequence[float] = ()
    more_is_better: bool = True
    goal: float | None = None
    bound: float | None = None
    reached: float | None = None
    not_run: str | None = None

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def share(self) -> float | None:
        """How much of the bound the ratio reaches; above 1 where ours has a better share of the machine than theirs."""
        if self.bound is None or self.ratio is None:
            return None
        return self.ratio / self.bound if self.more_is_better else self.bound / self.ratio

    @property
    def met(self) -> bool | None:
        if self.goal is None or self.not_run is not None:
            return None
        measured = self.ours if self.ratio is None else self.ratio
        return measured >= self.goal if self.more_is_better else measured <= self.goal


def speed(path: str, pairs: int, ours: Sequence[float], theirs: Sequence[float], **fields: float) -> Row:
    """A row for a rate: `pairs` in so many seconds, run by run; `fields` of the row."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    medians = [pairs / statistics.median(times) for times in (ours, theirs)]
    return Row(path, *medians, ratios, **fields)


def cost(path: str, ours: Sequence[float], theirs: Sequence[float] = (), **fields: float) -> Row:
    """A row for a cost, run by run: seconds or bytes; `fields` of the row."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)] if theirs else []
    return Row(path, statistics.median(ours), statistics.median(theirs) if theirs else None, ratios, False, **fields)


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    names = ["path", "ours/theirs (least to most)", "goal", "bound by operations", "reached of it", "ours", "theirs"]
    lines = [f"| {' | '.join(names)} | of the machine's best |", "|---" * 8 + "|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"**{row.ratio:.3g}** ({min(row.ratios):.3g} to {max(row.ratios):.3g})"
        ratio = ratio if row.not_run is None else f"not run: {row.not_run}"
        goal = "" if row.goal is None else f"{'≥' if row.more_is_better else '≤'} {row.goal:.3g}: {_verdict(row)}"
        share, reached = ("" if part is None else f"{part:.0%}" for part in (row.share, row.reached))
        cells = [row.path, ratio, goal, _number(row.bound), share, _number(row.ours), _number(row.theirs), reached]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def chart(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes a PNG: a bar for each ratio, with its spread, and a mark where its goal is."""
    shown = [row for row in rows if row.ratio is not None][::-1]
    figure = Figure(figsize=(9, 0.42 * len(shown) + 1.2))
    axis = figure.subplots()
    for place, row in enumerate(shown):
        color = OPEN if row.met is None else MET if row.met else MISSED
        spread = [[row.ratio - min(row.ratios)], [max(row.ratios) - row.ratio]]
        axis.barh(place, row.ratio, xerr=spread, color=color, height=0.6, ecolor="black", capsize=2)
        if row.goal is not None:
            axis.plot([row.goal] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
    axis.axvline(1, color=OPEN, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(shown)), [row.path for row in shown], fontsize=8)
    axis.set(xlabel="ours / theirs (bar: median, thin line: least to most, thick mark: goal)", title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _verdict(row: Row) -> str:
    return {True: "met", False: "not met", None: "open"}[row.met]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
