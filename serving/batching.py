"""One thread owns the model and batches waiting requests to the same bridge.

A row of a batch ends on its own: at its end token, its limit, its deadline, or when its caller disconnects. Its answer
is sent at once, and the other rows continue. A row's next token is the argmax, or what its own sampler draws.
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

from ..assembly.prompt_cache import kept_prompts
from ..assembly.stop_tokens import missing_tokens
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.processing_lorgnette import LorgnetteProcessor
from .errors import RefusedError
from .sampling import Sampler


logger = logging.getLogger(__name__)

_TEXT_INPUTS = ("input_ids", "attention_mask", "qformer_input_ids", "qformer_attention_mask")


@dataclass(eq=False)
class Request:
    """One row to generate.

    Args:
        inputs: the processor's output, one row.
        bridge: the adapter set's name in the model.
        use_lora: whether LoRA is active.
        max_new_tokens: limit on generated tokens.
        deadline: in `time.monotonic` seconds; generation stops at it.
        on_event: called in the model's thread with each new token, then once with the reason it ended: `"stop"`,
            `"length"`, or an exception.
        sampler: draws the tokens; None: greedy decoding.
        should_stop: called in the model's thread with all new tokens so far; True ends it with `"stop"`.
        is_cancelled: set it when the caller has disconnected.
    """

    inputs: dict[str, torch.Tensor]
    bridge: str
    use_lora: bool
    max_new_tokens: int
    deadline: float
    on_event: Callable[[int | str | Exception], None]
    sampler: Sampler | None = None
    should_stop: Callable[[list[int]], bool] = lambda tokens: False
    is_cancelled: bool = False
    tokens: list[int] = field(default_factory=list, init=False)
    ended: bool = field(default=False, init=False)

    @property
    def is_wanted(self) -> bool:
        return not self.is_cancelled and time.monotonic() < self.deadline

    @property
    def batch_key(self) -> tuple:
        """Requests with equal keys can share a batch."""
        others = {name: value for name, value in self.inputs.items() if name not in _TEXT_INPUTS}
        shapes = sorted((name, tuple(value.shape[1:])) for name, value in others.items())
        return self.bridge, self.use_lora, tuple(shapes), "qformer_input_ids" in self.inputs

    def end(self, reason: str | Exception) -> None:
        if not self.ended:
            self.ended = True
            self.on_event(reason)


class Batcher:
    """Answers requests in batches, the oldest first.

    Args:
        model: in eval mode, on its device; from now on only the batcher's thread uses it.
        processor: gives the end-of-answer and padding token ids.
        max_batch: rows.
        on_batch: called with the bridge and the number of rows of each batch.
    """

    def __init__(
        self,
        model: LorgnetteForConditionalGeneration,
        processor: LorgnetteProcessor,
        max_batch: int = 8,
        on_batch: Callable[[str, int], None] = lambda bridge, rows: None,
    ):
        self.model, self.processor, self.max_batch, self.on_batch = model, processor, max_batch, on_batch
        self._waiting: list[Request] = []
        self._condition, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Put a request into the queue. Raises [`RefusedError`] when stopping."""
        with self._condition:
            if self._stopping:
                raise _stopping()
            self._waiting.append(request)
            self._condition.notify()

    def stop(self) -> None:
        """Finish the running batch, refuse the waiting requests, and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        with kept_prompts(self.model):
            while batch := self._next():
                self._try_to_answer(batch)

    def _try_to_answer(self, batch: list[Request]) -> None:
        self.on_batch(batch[0].bridge, len(batch))
        try:
            self._answer(batch)
        except Exception as error:  # the thread continues: each request gets the error, the log gets the traceback
            logger.exception("a batch of %d failed", len(batch))
            for request in batch:
                request.end(RefusedError(500, "model_error", f"the model failed with {type(error).__name__}: {error}"))

    def _next(self) -> list[Request]:
        """The next batch; empty when stopping."""
        with self._condition:
            while not self._stopping:
                self._waiting = [request for request in self._waiting if request.is_wanted]
                if self._waiting:
                    kind = self._waiting[0].batch_key
                    batch = [request for request in self._waiting if request.batch_key == kind][: self.max_batch]
                    self._waiting = [request for request in self._waiting if request not in batch]
                    return batch
                self._condition.wait()
            for request in self._waiting:
                request.end(_stopping())
            self._waiting = []
            return []

    def _answer(self, batch: list[Request]) -> None:
        model = self.model
        model.set_bridge(batch[0].bridge)
        has_lora = model.config.lora_config is not None
        inputs = collate([request.inputs for request in batch], self.processor)
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        missing = missing_tokens(model.generation_config, self.processor)
        ends = missing.get("eos_token_id", model.generation_config.eos_token_id)
        draws = [_SampledTokens(batch)] if any(request.sampler for request in batch) else []
        rows = _RowStopping(batch, inputs["input_ids"].shape[1], {ends} if isinstance(ends, int) else set(ends))
        with model.disable_adapter() if has_lora and not batch[0].use_lora else nullcontext():
            model.generate(
                **inputs,
                **missing,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max(request.max_new_tokens for request in batch),
                logits_processor=LogitsProcessorList(draws),
                stopping_criteria=StoppingCriteriaList([rows]),
            )


class _SampledTokens(LogitsProcessor):
    """Sets the scores so that greedy decoding takes the token that a row's sampler drew; other rows are unchanged."""

    def __init__(self, batch: list[Request]):
        self.batch = batch

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        for row, request in enumerate(self.batch):
            if request.sampler is not None and not request.ended:
                token = request.sampler.draw(scores[row])
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores


class _RowStopping(StoppingCriteria):
    """Reports each row's new token to its request, and ends rows one by one."""

    def __init__(self, batch: list[Request], prompt_length: int, end_ids: set[int]):
        self.batch, self.prompt_length, self.end_ids = batch, prompt_length, end_ids

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        for request, token in zip(self.batch, input_ids[:, -1].tolist(), strict=True):
            if request.ended:
                continue
            if token in self.end_ids:
                request.end("stop")
                continue
            request.tokens.append(token)
            request.on_event(token)
            if request.should_stop(request.tokens):
                request.end("stop")
            elif len(request.tokens) >= request.max_new_tokens:
                request.end("length")
            elif not request.is_wanted:  # its caller got a timeout, or disconnected
                request.ended = True
        return torch.tensor([request.ended for request in self.batch], device=input_ids.device)


def collate(rows: list[dict[str, torch.Tensor]], processor: LorgnetteProcessor) -> dict[str, torch.Tensor]:
    """Join single processed rows into a batch: prompts are left-padded, pictures concatenated.

    Args:
        rows: each with `input_ids` and `attention_mask` `(1, S)`; `pixel_values` `(N, 3, H, W)` and their masks;
            `qformer_input_ids` and `qformer_attention_mask` `(N, T)`.

    Returns:
        the same names, `(B, S)`, `(sum of N, 3, H, W)` and `(sum of N, T)`.
    """
    pads = {"input_ids": processor.tokenizer.pad_token_id}
    if processor.qformer_tokenizer is not None:
        pads["qformer_input_ids"] = processor.qformer_tokenizer.pad_token_id
    return {
        name: pad_sequence(
            [ids for row in rows for ids in row[name]],
            batch_first=True,
            padding_value=pads.get(name, 0),
            padding_side="right" if name.startswith("qformer") else "left",
        )
        if name in _TEXT_INPUTS
        else torch.cat([row[name] for row in rows])
        for name in rows[0]
    }


def _stopping() -> RefusedError:
    return RefusedError(503, "stopping", "the worker is stopping", retry_after=5)
