"""Seconds of a training step's parts, from hooks on the models, autograd and the optimizer.

They are the process's seconds on all cores (`time.process_time`), so that other processes count little.

Backward passes are distinguished by when gradients arrive: at what the LM's layers returned, the head's is over, and at
what the Q-Former returned, theirs is.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.autograd import Variable
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks.memory import parts_of


HEAD = "forward: head, loss and the rest"
READING = "forward: Q-Former, heads and losses"  # of stage 1, whose plain side calls single layers of it


# parts that are timed, and what `benchmarks.operations` counts for them; others take the same on both sides
OPERATIONS = {
    ("forward: ViT",): ("ViT",),
    ("forward: Q-Former", "backward: what is left"): ("Q-Former, keys and values of pictures", "Q-Former, queries"),
    ("forward: projector", "forward: LM's layers", "backward: LM's layers and projector"): (
        *("projector", "LM's layers", "LoRA"),
    ),
    (HEAD, "backward: head and loss"): ("LM's head",),
    (READING, "backward: what is left"): (
        *("Q-Former, keys and values of pictures", "Q-Former, queries and texts", "head of ITG"),
    ),
}


def bound_by_parts(theirs: dict[str, float], counted: dict[str, float], own: dict[str, float]) -> float:
    """How many times as fast ours is if each part does its operations at the rate that the part has on their side.

    Clipping and optimizer take the same on both sides: the same weights train.

    Args:
        theirs: seconds of their parts.
        counted, own: operations of their step, and of ours, by part.
    """
    needed = 0.0
    left = dict(theirs)
    for parts, names in OPERATIONS.items():
        if set(names) <= counted.keys() and left.keys() & set(parts):
            share = sum(own[name] for name in names) / sum(counted[name] for name in names)
            needed += share * sum(left.pop(part, 0.0) for part in parts)
    return sum(theirs.values()) / (needed + sum(left.values()))


class StepParts:
    """While it is entered, `timed(run)` calls a run and keeps the seconds of its parts."""

    def __init__(self, models: Iterable[nn.Module]):
        self.models, self.found, self._hooks = list({id(model): model for model in models}.values()), {}, []

    def __enter__(self) -> "StepParts":
        hooked: set[int] = set()
        for model in self.models:
            is_stage2 = hasattr(model, "language_model")
            parts = parts_of(model) if is_stage2 else {"ViT": getattr(model, "blip2", model).vision_model}
            for name, part in parts.items():
                if id(part) not in hooked:  # models may share their ViT
                    hooked.add(id(part))
                    self._around(part, f"forward: {name}")
            if is_stage2:
                for name in ("LM's layers", "Q-Former"):
                    self._hooks.append(parts[name].register_forward_hook(self._watch(name)))
            self._around(model, HEAD if is_stage2 else READING, self._returned)
        self._hooks.append(register_optimizer_step_pre_hook(lambda *_: self._reach("clipping")))
        self._hooks.append(register_optimizer_step_post_hook(lambda *_: self._reach("optimizer")))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def timed(self, work: Callable[[], list[float]]) -> tuple[list[float], dict[str, float]]:
        """What `work` returns, and the seconds of the parts: of all but data loading and Trainer's own work."""
        self.found, self._at = {}, time.process_time()
        seconds = work()
        for rest in (HEAD, READING):  # of the forward pass as a whole, less its parts
            if rest in self.found:
                inner = sum(
                    value for name, value in self.found.items() if name.startswith("forward: ") and name != rest
                )
                self.found[rest] -= inner
        return seconds, self.found

    def _around(self, module: nn.Module, name: str, after: Callable[[Any], None] | None = None) -> None:
        started: list[float] = []

        def ends(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.found[name] = self.found.get(name, 0.0) + time.process_time() - started.pop()
            if after is not None:
                after(output)

        self._hooks.append(module.register_forward_pre_hook(lambda *_: started.append(time.process_time())))
        self._hooks.append(module.register_forward_hook(ends))

    def _returned(self, output: Any) -> None:
        """The model has returned: the backward pass is what follows."""
        self._at = time.process_time()

        def begins(_gradient: Any) -> None:
            Variable._execution_engine.queue_callback(lambda: self._reach("backward: what is left"))

        output["loss"].register_hook(begins)

    def _watch(self, name: str) -> Callable[..., None]:
        over = {"LM's layers": "backward: head and loss", "Q-Former": "backward: LM's layers and projector"}[name]

        def returned(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if output.last_hidden_state.requires_grad:
                output.last_hidden_state.register_hook(lambda _: self._reach(over))

        return returned

    def _reach(self, over: str) -> None:
        """Count what has passed since the last of these to `over`."""
        now = time.process_time()
        self.found[over] = self.found.get(over, 0.0) + now - self._at
        self._at = now
