"""Which operators of torch, and which functions of Python, a call spends its time in."""

import cProfile
import pstats
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


LISTED = 15  # operators or functions
PRODUCTS = "matrix products"
KINDS = {  # of operators, by what a name holds; the first that fits
    "data loader": ("DataLoader",),
    "attention": ("scaled_dot_product",),
    PRODUCTS: ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "convolution"),
    "losses": ("softmax", "nll_loss", "logsumexp"),
    "dropout's random numbers": ("bernoulli", "dropout"),
    "clipping and optimizer": ("_foreach", "adam", "Optimizer.", "vector_norm"),
    "copies, casts and indexing": ("copy", "::cat", "clone", "index", "gather", "scatter", "fill", "zero", "select"),
}


def operators_of(work: Callable[[], object]) -> dict[str, Any]:
    """Operators by self time, milliseconds and GFLOP of each, and the sums of their kinds."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as found:
        work()
    every = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    rows = [
        {"name": e.key, "calls": e.count, "ms": e.self_cpu_time_total / 1e3, "gflop": (e.flops or 0) / 1e9}
        for e in every
        if not e.key.startswith("ProfilerStep")
    ]
    kinds: dict[str, dict[str, float]] = {kind: {"ms": 0.0, "gflop": 0.0} for kind in (*KINDS, "all else")}
    for row in rows:
        kind = next((kind for kind, names in KINDS.items() if any(n in row["name"] for n in names)), "all else")
        kinds[kind]["ms"] += row["ms"]
        kinds[kind]["gflop"] += row["gflop"] if kind == PRODUCTS else 0.0
    return {"kinds": kinds, "most": rows[:LISTED], "ms": sum(row["ms"] for row in rows)}


def functions_of(load: Callable[[], object]) -> dict[str, list[dict[str, Any]]]:
    """Functions of a load by their own time, and the package's by the time that they and what they call take."""
    profiler = cProfile.Profile()
    profiler.runcall(load)
    package = str(Path(sys.modules["lorgnette"].__file__).parent)
    rows = []
    for (file, line, name), (_, calls, own, all_of_it, _) in pstats.Stats(profiler).stats.items():
        where = name if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"
        # a virtual environment may lie inside the repository
        is_ours = file.startswith(package) and not {"benchmarks", "site-packages"} & set(Path(file).parts)
        rows.append({"name": where, "calls": calls, "ms": 1e3 * own, "all": 1e3 * all_of_it, "ours": is_ours})
    by_own = sorted(rows, key=lambda row: -row["ms"])[:LISTED]
    return {"own": by_own, "ours": sorted((r for r in rows if r["ours"]), key=lambda row: -row["all"])[:LISTED]}
