"""Collate rows of a dataset into a training batch of either stage.

In stage 2 the texts of a picture follow one another in a row, behind a prompt that they share. In stage 1 each is a
row, beside fewer pictures.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..assembly.conversations import messages_of
from ..assembly.packing import PADDING
from ..assembly.picture_sizes import check_image_processor
from ..modeling.modeling_checks import IGNORED
from ..modeling.modeling_loss import POSITIONS_MULTIPLE
from ..processing.processing_lorgnette import LorgnetteProcessor
from ..processing.prompt_encoding import error_context, images_in, parts_of, query_in
from .augmentation import augment
from .row_seeds import NUM_QUERIES
from .texts import check_text, pairs_of, picture_number, texts_of
from .unsupported import Batch, refuse_unsupported_arguments


refuse_unsupported_arguments()


class LengthError(ValueError):
    """A row is longer than the context."""


@dataclass
class LorgnetteCollator:
    """Collate rows into the inputs of `forward`, for the processor's stage.

    A row has an image (or a list of images) in one column and the target text in another, or a chat in `messages` whose
    last message, the assistant's, is the target ([`messages_of`] lists the formats of a chat). The images of a chat are
    in its parts, or in the image column for parts `{"type": "image"}`; in a chat without such parts they come after the
    first user message's text, as in [`~LorgnetteProcessor.build_prompt`]. A `vision_features` column, `(L, E)` or
    `(n, L, E)` for n images, replaces the image column.

    The text column may hold several texts of one picture, in a list: each is learned as if it had a row of its own, and
    ViT, Q-Former and prompt are computed once. With a list in `query_column` beside it each question has the answer at
    its place. In stage 1 the texts of a picture are no negatives of each other; an `image_id` column, an integer or a
    string, says which rows have the same picture (by default their `index`, so that each has its own).

    Set `remove_unused_columns=False` in the `Trainer`. Batches keep an `index` column as `row_index`, and errors name
    it; without one they name the row's position in the batch.

    Args:
        processor: with the LM's tokenizer for stage 2; with only the Q-Former's for stage 1.
        image_column, text_column: the columns' names.
        query: the query of every prompt; the processor's by default, `""` for none.
        query_column: a column with each row's own query, in place of `query`.
        max_length: maximum tokens of a row, placeholders included; by default the tokenizer's context length.
        pack_to: in stage 2, pack several examples into rows of at most so many tokens, in place of padding; attention
            stays within each example.
        pad_to_multiple_of: pad batches to a multiple of it: a compiled model recompiles for each length.

    Raises:
        ValueError: `query` and `query_column` are both given; `pack_to` in stage 1, or below 1; so is
            `pad_to_multiple_of`.
    """

    processor: LorgnetteProcessor
    image_column: str = "image"
    text_column: str = "text"
    query: str | None = None
    query_column: str | None = None
    max_length: int | None = None
    pack_to: int | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        self._loaded: dict[Any, Image.Image] = {}  # pictures of the current batch
        if self.query is not None and self.query_column is not None:
            raise ValueError("query and query_column exclude each other: give one of them")
        if self.pack_to is not None and self.processor.is_stage1:
            raise ValueError("pack_to is for stage 2: in stage 1 each text is compared with each picture")
        check_image_processor(self.processor.image_processor, self.processor.max_image_pixels)
        for name in ("pack_to", "pad_to_multiple_of"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it has to be at least 1")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of B rows with N images.

        Returns:
            `input_ids`, `attention_mask` `(B, S)` int64, right-padded, in stage 1 a row for each text; in stage 2
            `labels` `(B, S)`, -100 except on the output and its stop tokens; `pixel_values` `(N, 3, H, W)` with the
            image processor's other keys, or `vision_features` `(N, L, E)`; `image_rows` if a picture occurs several
            times (in stage 1 the picture of each text): `pixel_values` then holds it once; in stage 1 `image_ids`
            `(N,)`, the pictures' numbers; `qformer_input_ids`, `qformer_attention_mask` `(N, T)` for a Q-Former that
            takes instructions; `row_index` `(B,)` if rows have an `index`; `shared_input_ids` `(B, P)`, the common
            prefix of all prompts. With `pack_to` there are fewer rows than B, and `sequence_ids` in place of
            `attention_mask`; with several texts a picture also, and `text_ids` beside them. In stage 2
            `supervised_positions` `(K,)`: indices into the flattened `labels` that are not -100, padded with 0, so
            that the LM's head computes only these, and no GPU is waited for to learn which they are. With elastic
            queries `num_query_tokens`, an int: each image has so many placeholders.

        Raises:
            ValueError: a missing column (with the existing ones), an empty text, one longer than the context (with
                the numbers), an invalid image; for OSError and TypeError see
                [`~LorgnetteProcessor.load_image`]. All name the row.
        """
        if rows and rows[0].get(NUM_QUERIES) is not None:
            return self._with_fewer_queries(rows, rows[0][NUM_QUERIES])
        examples = self._examples(rows, self.encode)
        if self.processor.is_stage1:
            texts = [ids for example in examples for ids in example.outputs]
            batch = {"input_ids": self._padded(texts, self.processor.tokenizer.pad_token_id)}
            batch["attention_mask"] = self._padded([[1] * len(ids) for ids in texts], 0)
            rows_of_texts = [example.index for example in examples for _ in example.outputs]
            return Batch.of(batch | self._images(examples) | _row_index(rows_of_texts))
        columns = [self._columns(example) for example in examples]
        rows_of = [[n] for n in range(len(examples))]  # the examples of each row of the batch
        if self.pack_to is not None:
            rows_of = packs([len(column["input_ids"]) for column in columns], self.pack_to)
        order = [n for row in rows_of for n in row]
        for number, n in enumerate(order):
            columns[n]["sequence_ids"] = [number] * len(columns[n]["input_ids"])
        examples = [examples[n] for n in order]

        def joined(name: str, padding: int) -> torch.Tensor:
            return self._padded([[value for n in row for value in columns[n][name]] for row in rows_of], padding)

        batch = {"input_ids": joined("input_ids", self.processor.tokenizer.pad_token_id)}
        batch["labels"] = joined("labels", IGNORED)
        has_several = any(len(example.outputs) > 1 for example in examples)
        if has_several or self.pack_to is not None:
            batch["sequence_ids"] = joined("sequence_ids", PADDING)
        else:
            batch["attention_mask"] = self._padded([[1] * len(column["input_ids"]) for column in columns], 0)
            if prefix := self._common_prefix([example.prompt for example in examples]):
                batch["shared_input_ids"] = batch["input_ids"][:, :prefix]
        if has_several:
            batch["text_ids"] = joined("text_ids", 0)
        labelled = (batch["labels"].flatten() != IGNORED).nonzero().squeeze(1)
        labelled = pad(labelled, (0, -len(labelled) % POSITIONS_MULTIPLE))
        batch["supervised_positions"] = self._padded([labelled.tolist()], 0)[0]
        return Batch.of(batch | self._images(examples) | _row_index([example.index for example in examples]))

    def _with_fewer_queries(self, rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
        """A batch with so many placeholders an image."""
        fewer = copy.copy(self)
        fewer.processor = copy.copy(self.processor)
        fewer.processor.num_query_tokens = count
        batch = fewer([row | {NUM_QUERIES: None} for row in rows])
        batch["num_query_tokens"] = count
        return batch

    def prompts(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make the inputs of `generate`: the rows' prompts without answers, with the same ids as in training.

        Returns:
            `input_ids`, `attention_mask` `(B, S)` int64, left-padded, and the images as in a batch. The text
            column may be missing.

        Raises:
            ValueError, OSError, TypeError: as for a batch; or a stage-1 processor, which has no prompts.
        """
        examples = self._examples(rows, self._encode_prompt)
        pad_token_id = self.processor.tokenizer.pad_token_id
        return (
            {
                "input_ids": self._padded([example.prompt for example in examples], pad_token_id, "left"),
                "attention_mask": self._padded([[1] * len(example.prompt) for example in examples], 0, "left"),
            }
            | self._images(examples)
            | _row_index([example.index for example in examples])
        )

    def prompt_lengths(self, rows: list[dict[str, Any]]) -> list[int]:
        """Numbers of tokens of the rows' prompts, placeholders included; loads no picture.

        Raises:
            ValueError, TypeError: as [`prompts`], except for pictures.
        """
        return [len(example.prompt) for _, (example,) in self._encoded(rows, self._encode_prompt)]

    def encode(self, row: dict[str, Any]) -> list["_Example"]:
        """A row's tokens, for each of its questions, and in place of its images functions that load them.

        Raises:
            LengthError: it is longer than the context.
            ValueError, TypeError: as for a batch, except for pictures.
        """
        if self.processor.is_stage1:
            return [self._encode_pair(row)]
        return [self._encode_text(pair) for pair in pairs_of(row, self.text_column, self.query_column)]

    def _encode_prompt(self, row: dict[str, Any]) -> list["_Example"]:
        return [self._encode_text(row, answered=False)]

    def forget_images(self) -> None:
        """Drop the images that the functions of [`encode`] have loaded; each batch does so itself."""
        self._loaded.clear()

    def _examples(
        self, rows: list[dict[str, Any]], encode: Callable[[dict[str, Any]], list["_Example"]]
    ) -> list["_Example"]:
        if not rows:
            raise ValueError("the batch is empty")
        self.forget_images()

        def encode_and_load(row: dict[str, Any]) -> list["_Example"]:
            examples = encode(row)
            images = [load() for load in examples[0].images]
            if "augmentation_seed" in row:  # only training rows have one, see augmentation.py
                generator = np.random.default_rng(row["augmentation_seed"])
                images = [augment(image, generator) for image in images]
            for example in examples:
                example.images = images
            return examples

        examples = []
        for row, found in self._encoded(rows, encode_and_load):
            for example in found:
                example.index = row.get("index")
            examples += found
        return examples

    @staticmethod
    def _encoded(
        rows: list[dict[str, Any]], encode: Callable[[dict[str, Any]], list["_Example"]]
    ) -> Iterator[tuple[dict[str, Any], list["_Example"]]]:
        """Each row and its examples; errors name the row."""
        for position, row in enumerate(rows):
            with error_context(f"row {row['index']}" if "index" in row else f"row {position} of the batch"):
                found = encode(row)
            yield row, found

    def _columns(self, example: "_Example") -> dict[str, list[int]]:
        """The tokens of an example, and the label and the text of each."""
        *prompt, last = example.prompt
        columns = {"input_ids": prompt, "labels": [IGNORED] * len(prompt), "text_ids": [0] * len(prompt)}
        # a text begins with the prompt's last token; the model knows that of a picture, which occurs once
        again = self.processor.tokenizer.pad_token_id if last == self.processor.image_token_id else last
        for number, output in enumerate(example.outputs, start=1):
            columns["input_ids"] += [last if number == 1 else again, *output]
            columns["labels"] += [IGNORED, *output]
            columns["text_ids"] += [number] * (1 + len(output))
        return columns

    def _images(self, examples: list["_Example"]) -> dict[str, torch.Tensor]:
        """The batch's images, each once, and the Q-Former's instructions."""
        batch: dict[str, torch.Tensor] = {}
        if instructions := [ids for example in examples for ids in example.instructions]:
            batch["qformer_input_ids"] = self._padded(instructions, self.processor.qformer_tokenizer.pad_token_id)
            batch["qformer_attention_mask"] = self._padded([[1] * len(ids) for ids in instructions], 0)
        is_stage1 = self.processor.is_stage1
        shown = [
            (image, example.image_id)
            for example in examples
            for _ in (example.outputs if is_stage1 else [None])
            for image in example.images
        ]
        if not shown:
            return batch
        distinct: dict[int, tuple[Any, Any]] = {}
        for image, number in shown:
            distinct.setdefault(id(image), (image, number))
        images, numbers = zip(*distinct.values(), strict=True)
        if isinstance(images[0], torch.Tensor):
            if len(shapes := {tuple(features.shape) for features in images}) > 1:
                raise ValueError(f"the vision_features of a batch differ in shape: {sorted(shapes)}")
            batch["vision_features"] = torch.stack(images)
        else:
            batch |= self.processor.encode_images(list(images), return_tensors="pt")
        if len(distinct) < len(shown):
            positions = {key: position for position, key in enumerate(distinct)}
            batch["image_rows"] = torch.tensor([positions[id(image)] for image, _ in shown])
        if is_stage1 and None not in numbers:
            batch["image_ids"] = torch.tensor(numbers)
        return batch

    def _encode_pair(self, row: dict[str, Any]) -> "_Example":
        """A row of stage 1, with a function that loads the image."""
        texts = texts_of(_column(row, self.text_column), self.text_column)
        encoded = self.processor.encode_for_qformer(texts)["input_ids"]
        for text, ids in zip(texts, encoded, strict=True):
            if len(ids) <= self.processor.qformer_tokenizer.num_special_tokens_to_add():
                raise ValueError(
                    f"column '{self.text_column}' is {text!r:.100}, which the tokenizer turns into no tokens"
                )
        self._check_lengths([], encoded, self.processor.qformer_tokenizer)
        images = self._sources(row)
        if len(images) != 1:
            raise ValueError(f"{len(images)} images; stage 1 needs one image and its texts")
        has_number = "image_id" in row or "index" in row
        number = picture_number(row.get("image_id", row.get("index"))) if has_number else None
        return _Example([], encoded, images, image_id=number)

    def _encode_text(self, row: dict[str, Any], answered: bool = True) -> "_Example":
        """A row of stage 2, with functions that load the images."""
        texts: list[str | None] = [None]
        if row.get("messages") is not None:
            if self.text_column != "messages" and isinstance(row.get(self.text_column), (list, tuple)):
                raise ValueError(f"the row has messages and a list of texts in '{self.text_column}': leave one out")
            messages, output, images = self._chat(row)
            query = query_in(messages)
            prompt, ids = self.processor.encode_example(output if answered else None, messages=messages)
        else:
            if answered:
                texts = texts_of(_column(row, self.text_column), self.text_column)
            images, query = self._sources(row), self.query
            if self.query_column is not None:
                query = check_text(_column(row, self.query_column), f"column '{self.query_column}'")
            prompt, ids = self.processor.encode_example(texts[0], query=query, num_images=len(images))
        outputs = [ids, *(self.processor.encode_answer(text) for text in texts[1:])]
        self._check_lengths(prompt, outputs, self.processor.tokenizer)
        instructions: list[list[int]] = []
        if self.processor.qformer_tokenizer is not None and images:
            query = self.processor.query if query is None else query
            instructions = self.processor.encode_for_qformer([query] * len(images))["input_ids"]
        return _Example(prompt, outputs, images, instructions)

    def _chat(self, row: dict[str, Any]) -> tuple[list[dict[str, Any]], str, list[Callable[[], Any]]]:
        """The messages before the answer, the answer, and functions that load the images."""
        chat = messages_of(row["messages"])
        *messages, answer = chat or [{}]
        if answer.get("role") != "assistant" or not messages:
            roles = [message["role"][:100] for message in chat]
            raise ValueError(f"the last of the messages has to be the assistant's answer; their roles are {roles}")
        output = "\n".join(part.get("text", "<image>") for part in parts_of(answer))
        if _count_images([answer]) or not output.strip():
            raise ValueError(f"the assistant's answer has to be text; it is {output!r:.100}")
        has_column = row.get(self.image_column) is not None or "vision_features" in row
        in_column = self._sources(row) if has_column else []
        if in_column and not _count_images(messages):
            first = next((n for n, message in enumerate(messages) if message.get("role") == "user"), 0)
            shown = [*parts_of(messages[first]), *[{"type": "image"}] * len(in_column)]
            messages[first] = {**messages[first], "content": shown}
        in_parts = images_in(messages)
        placeholders = _count_images(messages) - len(in_parts)
        if placeholders != len(in_column) or (in_parts and in_column):
            raise ValueError(
                f'the messages have {placeholders} parts {{"type": "image"}} without a picture and {len(in_parts)} '
                f"with one, and column '{self.image_column}' has {len(in_column)} images: "
                "all have to be in the messages or in the column"
            )
        return messages, output, in_column or [partial(self._load, image) for image in in_parts]

    def _sources(self, row: dict[str, Any]) -> list[Callable[[], Any]]:
        """Functions that load the images of the image column, or give their features."""
        if self.image_column not in row and "vision_features" in row:
            features = torch.as_tensor(row["vision_features"])
            return [lambda one=one: one for one in (features if features.ndim == 3 else [features])]
        value = _column(row, self.image_column)
        images = value if isinstance(value, (list, tuple)) else [value]
        if not images:
            raise ValueError(f"column '{self.image_column}' is an empty list")
        return [partial(self._load, image) for image in images]

    def _common_prefix(self, prompts: list[list[int]]) -> int:
        """How many tokens several prompts all begin with: before the first placeholder, and not all of any."""
        if len(prompts) == 1:
            return 0
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        image = self.processor.image_token_id
        return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1 and ids[0] != image, columns))

    def _load(self, image: Any) -> Image.Image:
        """A picture that the batch has several times is loaded once."""
        key = _identity(image)
        if key is None:
            return self.processor.load_image(image)
        if key not in self._loaded:
            self._loaded[key] = self.processor.load_image(image)
        return self._loaded[key]

    def _padded(self, rows: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
        sequences = [torch.tensor(row, dtype=torch.long) for row in rows]
        padded = pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side)
        extra = -padded.shape[1] % (self.pad_to_multiple_of or 1)
        return pad(padded, (0, extra) if side == "right" else (extra, 0), value=value)

    def _check_lengths(self, prompt: list[int], outputs: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
        limit = tokenizer.model_max_length if self.max_length is None else self.max_length
        for number, output in enumerate(outputs):
            if len(prompt) + len(output) > limit:
                placeholders = prompt.count(self.processor.image_token_id)
                which = f"text {number} of {len(outputs)}: " if len(outputs) > 1 else ""
                raise LengthError(
                    f"{which}{len(prompt) + len(output)} tokens are more than the maximum of {limit}: {len(output)} of "
                    f"output, {placeholders} for images, {len(prompt) - placeholders} of the other prompt"
                )


def _count_images(messages: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for message in messages for part in parts_of(message))


def packs(lengths: list[int], room: int) -> list[list[int]]:
    """First-fit decreasing packing of examples into rows of `room` tokens.

    An example longer than `room` gets a row of its own.
    """
    shared: list[list[int]] = []
    left: list[int] = []
    for n in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        row = next((row for row, room_left in enumerate(left) if lengths[n] <= room_left), None)
        if row is None:
            row = len(shared)
            shared.append([])
            left.append(room)
        shared[row].append(n)
        left[row] -= lengths[n]
    return shared


@dataclass
class _Example:
    """A question about N images, encoded.

    Attributes:
        prompt: its ids.
        outputs: the ids of each of its texts.
        images: loaded, or functions that load them; or features.
        instructions: N, for the Q-Former.
        index: its row in the data set.
        image_id: the number of its picture.
    """

    prompt: list[int]
    outputs: list[list[int]]
    images: list[Any]
    instructions: list[list[int]] = field(default_factory=list)
    index: int | None = None
    image_id: int | None = None


def _row_index(rows: list[int | None]) -> dict[str, torch.Tensor]:
    """`row_index`, where all rows have an `index`."""
    return {} if None in rows else {"row_index": torch.tensor(rows)}


def _identity(image: Any) -> Any:
    """A key that is equal for equal pictures: a path, a URL, a file's content, an object's id. None: unknown."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    return id(image) if isinstance(image, Image.Image) else image if isinstance(image, (str, bytes, PurePath)) else None


def _column(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(
            f"there is no column '{name}', only {sorted(row)}; if Trainer removed it, set remove_unused_columns=False"
        )
    return row[name]
