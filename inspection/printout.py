"""Print an inspection to the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..trainer.labelled_text import labelled_text
from .inspector import Inspection
from .report import human_shape, human_size


MARKS = {True: "[bold green]✓ green[/]", False: "[bold red]✗ red[/]", None: "[dim]· not run[/]"}


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Print components, checks and attributions.

    Args:
        console: stdout by default.
    """
    console = console or Console()
    console.rule(f"[bold]{escape(inspection.model)}")
    console.print(_flow(inspection), justify="left")
    console.print(_parts(inspection))
    for check in inspection.checks:
        console.print(f"{MARKS[check.passed]}  [bold]{escape(check.title)}[/]")
        console.print(Text(check.finding, style="dim"), soft_wrap=False)
        if check.advice:
            console.print(Text(f"→ {check.advice}", style="yellow" if check.passed is False else "dim"))
        if check.name == "labels" and check.figures:
            console.print(labelled_text(check.figures["example"]))
    for attribution in inspection.attributions:
        console.print(f"\n{escape(attribution.name)}: answer [bold]{escape(attribution.answer) or '(nothing)'}[/]")
        for word in attribution.words:
            row, column = divmod(int(word.patches.argmax()), word.patches.shape[1])
            where = (
                f"most from visual token {int(word.visual_tokens.argmax())} and the patch in row {row}, column {column}"
            )
            console.print(Text(f"  {word.text.strip()}: probability {word.probability:.2f}, {where}", style="dim"))


def _flow(inspection: Inspection) -> Text:
    text = Text()
    for tensor in inspection.flow:
        text.append(f"  ─ {tensor.part} ─▶ " if tensor.part else "  ", style="cyan")
        text.append(human_shape(tensor.shape), style="bold").append(f" {tensor.what}\n")
    return text


def _parts(inspection: Inspection) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("part", "parameters", "train", "bytes", "dtype", "device", "weights from"):
        justify = "right" if heading in ("parameters", "train", "bytes") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for part in inspection.parts:
        trains = "all" if part.trainable == part.parameters else f"{part.trainable:,}" if part.trainable else "frozen"
        columns = (", ".join(part.dtypes), ", ".join(part.devices), part.source)
        table.add_row(part.name, f"{part.parameters:,}", trains, human_size(part.bytes), *map(escape, columns))
    return table
