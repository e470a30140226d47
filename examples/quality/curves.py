"""How training went, from the logs that the stock Trainer leaves behind."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot: no window, whatever the machine


def curves(logs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Writes a PNG with a panel for each run: all losses in its `log_history` over the steps."""
    figure = Figure(figsize=(5 * len(logs), 3.2))
    for axis, (title, log) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True):
        names = [name for entry in log for name in entry if is_loss(name)]
        for name in dict.fromkeys(names):
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            axis.plot(*zip(*points, strict=True), label=name, marker="o", markersize=2)
        axis.set(title=title, xlabel="step", ylabel="loss (nats)", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def is_loss(name: str) -> bool:
    return name.removeprefix("eval_").startswith("loss")
