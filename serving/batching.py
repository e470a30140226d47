"""One thread that owns the model: waiting questions to the same bridge are answered together.

A row of a batch ends by itself, with its end token, its limit or its deadline, or when nobody waits for it any more;
its answer leaves at once, while the others go on. A row's next token is the likeliest, or what its own sampler draws.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..assembly.stop_tokens import missing_tokens
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.processing_lorgnette import LorgnetteProcessor
from .errors import RefusedError
from .sampling import Sampler


logger = logging.getLogger(__name__)

_WORDS = ("input_ids", "attention_mask", "qformer_input_ids", "qformer_attention_mask")


@dataclass(eq=False)
class Ticket:
    """A question on its way through the model.

    Args:
        inputs: what the processor makes of it, one row.
        bridge: in the model.
        use_lora: whether it is answered with LoRA.
        max_new_tokens: at most so many tokens are generated.
        deadline: by `time.monotonic`; nothing more is generated after it.
        tell: called in the model's thread with each new token, then once with why it ended: `"stop"`, `"length"`, or
            an exception.
        sampler: draws its tokens; None: the likeliest is taken.
        is_over: called in the model's thread with all new tokens so far; True ends it with `"stop"`.
        gone: set it when nobody waits any more.
    """

    inputs: dict[str, torch.Tensor]
    bridge: str
    use_lora: bool
    max_new_tokens: int
    deadline: float
    tell: Callable[[int | str | Exception], None]
    sampler: Sampler | None = None
    is_over: Callable[[list[int]], bool] = lambda tokens: False
    gone: bool = False
    tokens: list[int] = field(default_factory=list, init=False)
    ended: bool = field(default=False, init=False)

    @property
    def is_wanted(self) -> bool:
        return not self.gone and time.monotonic() < self.deadline

    @property
    def batches_with(self) -> tuple:
        """Tickets for which this is equal can share a batch."""
        pictures = sorted((name, tuple(value.shape[1:])) for name, value in self.inputs.items() if name not in _WORDS)
        return self.bridge, self.use_lora, tuple(pictures), "qformer_input_ids" in self.inputs

    def end(self, why: str | Exception) -> None:
        if not self.ended:
            self.ended = True
            self.tell(why)


class Batcher:
    """Answers tickets, those that have waited longest first.

    Args:
        model: in eval mode, on its device; from now on nobody else touches it.
        processor: knows what ends an answer, and what pads.
        max_batch: rows.
        on_batch: told the bridge and the number of rows of each batch.
    """

    def __init__(
        self,
        model: LorgnetteForConditionalGeneration,
        processor: LorgnetteProcessor,
        max_batch: int = 8,
        on_batch: Callable[[str, int], None] = lambda bridge, rows: None,
    ):
        self.model, self.processor, self.max_batch, self.on_batch = model, processor, max_batch, on_batch
        self._waiting: list[Ticket] = []
        self._changed, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Tickets that no batch has taken yet."""
        return len(self._waiting)

    def submit(self, ticket: Ticket) -> None:
        """Let a ticket wait for its turn. Raises [`RefusedError`] when stopping."""
        with self._changed:
            if self._stopping:
                raise _stopping()
            self._waiting.append(ticket)
            self._changed.notify()

    def stop(self) -> None:
        """Finish the batch that is under way, refuse what waits, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            self.on_batch(batch[0].bridge, len(batch))
            try:
                self._answer(batch)
            except Exception as error:  # the thread goes on: each ticket has its error, and the log the trace
                logger.exception("a batch of %d failed", len(batch))
                for ticket in batch:
                    ticket.end(
                        RefusedError(500, "model_error", f"the model failed with {type(error).__name__}: {error}")
                    )

    def _next(self) -> list[Ticket]:
        """The next batch; empty when stopping."""
        with self._changed:
            while not self._stopping:
                self._waiting = [ticket for ticket in self._waiting if ticket.is_wanted]
                if self._waiting:
                    kind = self._waiting[0].batches_with
                    batch = [ticket for ticket in self._waiting if ticket.batches_with == kind][: self.max_batch]
                    self._waiting = [ticket for ticket in self._waiting if ticket not in batch]
                    return batch
                self._changed.wait()
            for ticket in self._waiting:
                ticket.end(_stopping())
            self._waiting = []
            return []

    def _answer(self, batch: list[Ticket]) -> None:
        model = self.model
        model.set_bridge(batch[0].bridge)
        has_lora = model.config.lora_config is not None
        inputs = collate([ticket.inputs for ticket in batch], self.processor)
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        missing = missing_tokens(model.generation_config, self.processor)
        ends = missing.get("eos_token_id", model.generation_config.eos_token_id)
        draws = [_Draws(batch)] if any(ticket.sampler for ticket in batch) else []
        rows = _Rows(batch, inputs["input_ids"].shape[1], {ends} if isinstance(ends, int) else set(ends))
        with model.disable_adapter() if has_lora and not batch[0].use_lora else nullcontext():
            model.generate(
                **inputs,
                **missing,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max(ticket.max_new_tokens for ticket in batch),
                logits_processor=LogitsProcessorList(draws),
                stopping_criteria=StoppingCriteriaList([rows]),
            )


class _Draws(LogitsProcessor):
    """Makes the token that a row's sampler draws its likeliest. Rows without a sampler stay as they are."""

    def __init__(self, batch: list[Ticket]):
        self.batch = batch

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        for row, ticket in enumerate(self.batch):
            if ticket.sampler is not None and not ticket.ended:
                token = ticket.sampler.draw(scores[row])
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores


class _Rows(StoppingCriteria):
    """Passes on each row's new token, and says which rows have ended."""

    def __init__(self, batch: list[Ticket], prompt_length: int, end_ids: set[int]):
        self.batch, self.prompt_length, self.end_ids = batch, prompt_length, end_ids

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        for ticket, token in zip(self.batch, input_ids[:, -1].tolist(), strict=True):
            if ticket.ended:
                continue
            if token in self.end_ids:
                ticket.end("stop")
                continue
            ticket.tokens.append(token)
            ticket.tell(token)
            if ticket.is_over(ticket.tokens):
                ticket.end("stop")
            elif len(ticket.tokens) >= ticket.max_new_tokens:
                ticket.end("length")
            elif not ticket.is_wanted:  # its caller has been told already, or is gone
                ticket.ended = True
        return torch.tensor([ticket.ended for ticket in self.batch], device=input_ids.device)


def collate(rows: list[dict[str, torch.Tensor]], processor: LorgnetteProcessor) -> dict[str, torch.Tensor]:
    """Rows as the processor makes them, one at a time, to a batch: prompts padded on the left, pictures in a row.

    Args:
        rows: each with `input_ids` and `attention_mask` `(1, S)`; `pixel_values` `(N, 3, H, W)` and what goes with it;
            `qformer_input_ids` and `qformer_attention_mask` `(N, T)`.

    Returns:
        the same names, `(B, S)`, `(sum of N, 3, H, W)` and `(sum of N, T)`.
    """
    pads = {"input_ids": processor.tokenizer.pad_token_id}
    if processor.qformer_tokenizer is not None:
        pads["qformer_input_ids"] = processor.qformer_tokenizer.pad_token_id
    return {
        name: pad_sequence(
            [words for row in rows for words in row[name]],
            batch_first=True,
            padding_value=pads.get(name, 0),
            padding_side="right" if name.startswith("qformer") else "left",
        )
        if name in _WORDS
        else torch.cat([row[name] for row in rows])
        for name in rows[0]
    }


def _stopping() -> RefusedError:
    return RefusedError(503, "stopping", "the worker is stopping", retry_after=5)
