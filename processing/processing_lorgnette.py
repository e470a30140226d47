"""`LorgnetteProcessor`: pictures and words in, what the model's `forward` reads out."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, processing_utils
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # torchvision is optional here in 5.17
from transformers.utils import PROCESSOR_NAME

from ..configuration.configuration_lorgnette import AUTO_PROCESSOR, IN_PACKAGE, from_package, save_code
from .image_loading import MAX_IMAGE_PIXELS, WERE_FLOATS, load_image_for
from .prompt_encoding import (
    IMAGE_TOKEN,
    answer_frame,
    check_unicode,
    conversations_of,
    encode,
    error_context,
    escape_special_tokens,
    images_in,
    is_prepared,
    query_in,
    render,
    replacement_offsets,
    texts_of,
    with_start,
)


_TOKENIZERS = ("tokenizer", "qformer_tokenizer")
_FIELDS = ("num_query_tokens", "system_prompt", "query", "chat_template", "max_image_pixels")
_KINDS = ("Processing", "Text", "Images", "Videos", "Audio")  # programs pass keywords of the latter with pictures
_KNOWN = {"common_kwargs"}.union(*(vars(processing_utils)[f"{kind}Kwargs"].__annotations__ for kind in _KINDS))
_ASSEMBLY = "assembly.processors"


class LorgnetteProcessor(processing_utils.ProcessorMixin):
    """The ViT's image processor, the LM's tokenizer, and the prompt of both training and use.

    One `<image>` in a prompt becomes `num_query_tokens` placeholders. It is markup in `text=`; in a query, a system
    prompt, an output and the text parts of messages it is plain text, and so are the LM's special tokens. Prompts have
    one BOS where the LM's tokenizer adds one, and no EOS. Batches are padded on the left.

    Args:
        image_processor: the ViT's.
        tokenizer: the LM's; a copy gets `<image>` and a pad token. None in stage 1, where this is the Q-Former's.
        qformer_tokenizer: the Q-Former's, for stage 1 and for instructions as InstructBLIP has them.
        num_query_tokens: visual tokens, and so placeholders, per image.
        system_prompt, query: what prompts say by default; without a system prompt the chat template decides.
        chat_template: Jinja; the tokenizer's own by default.
        max_image_pixels: a picture with more is refused before it is decoded; so it is by Pillow's own limit.

    Raises a ValueError for no tokenizer, one without both pad and EOS token, a part whose class is not transformers'
    own, a number out of range; an ImportError for a tokenizer without `<image>` where lorgnette is not installed.
    """

    image_token = IMAGE_TOKEN

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase | None = None,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        num_query_tokens: int = 32,
        system_prompt: str | None = None,
        query: str = "Describe the picture.",
        chat_template: str | dict[str, str] | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):
        if IN_PACKAGE:
            check = from_package(_ASSEMBLY, "").check_processor_fields
            check(image_processor, tokenizer, qformer_tokenizer, num_query_tokens, max_image_pixels)
        if tokenizer is not None and not is_prepared(tokenizer):
            tokenizer = from_package(_ASSEMBLY, "a tokenizer without <image>").prepare_tokenizer(tokenizer)
        super().__init__(image_processor, tokenizer or qformer_tokenizer, qformer_tokenizer)
        self.chat_template = self.chat_template if chat_template is None else chat_template
        self.num_query_tokens, self.system_prompt, self.query = num_query_tokens, system_prompt, query
        self.max_image_pixels = max_image_pixels

    @classmethod
    def from_backbones(
        cls, vision: str | Path | BaseImageProcessor, text: str | Path | PreTrainedTokenizerBase | None, **kwargs: Any
    ) -> "LorgnetteProcessor":
        """Make a processor of the backbones' own parts; needs the package, see `lorgnette.assembly.processors`."""
        return from_package(_ASSEMBLY, "from_backbones").from_backbones(cls, vision, text, **kwargs)

    @classmethod
    def from_blip2(cls, source: str | Path, **kwargs: Any) -> "LorgnetteProcessor":
        """Make the processor of a `Blip2ForConditionalGeneration`; needs the package, see `assembly.processors`."""
        return from_package(_ASSEMBLY, "LorgnetteProcessor.from_blip2").from_blip2(cls, source, **kwargs)

    @property
    def is_stage1(self) -> bool:
        """Whether there is no LM here: texts go to the Q-Former alone."""
        return self.tokenizer is self.qformer_tokenizer

    @property
    def image_token_id(self) -> int | None:
        """Id of `<image>` in the LM's tokenizer; None in stage 1."""
        return None if self.is_stage1 else self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The tokenizer's, saved with it; None where prompts are plain."""
        return getattr(self.__dict__.get("tokenizer"), "chat_template", None)

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        if "tokenizer" in self.__dict__:
            self.tokenizer.chat_template = template

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends an answer: the end of a turn in the chat template and the tokenizer's EOS."""
        eos = self.tokenizer.eos_token_id
        return sorted({answer_frame(self.tokenizer)[1][-1], *([] if eos is None else [eos])})

    def build_prompt(
        self, query: str | None = None, system: str | None = None, output: str | None = None, num_images: int = 1
    ) -> str:
        """Write `<SYSTEM> <QUERY> <IMAGE> <OUTPUT>` in the LM's chat template, or plainly, a part a line, without one.

        `query` and `system` are this processor's by default, and none where they are `""`. Without an `output` the
        prompt ends where the LM is to answer. In all three, Unicode's noncharacters mark control tokens. Raises a
        ValueError where the template refuses it (put `system` in the query), or where one is no string.
        """
        query, system = self.query if query is None else query, self.system_prompt if system is None else system
        words = [{"type": "text", "text": query}] if query else []
        messages = [{"role": "user", "content": words + [{"type": "image"}] * num_images}]
        if system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        if output is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": output}]})
        return self.apply_chat_template(messages, add_generation_prompt=output is None)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As `ProcessorMixin.apply_chat_template`, for the templates of text-only LMs, and for LMs without any.

        `conversation` is a list of messages, or a list of such lists, whose contents are strings or parts, see
        [`parts_of`]. Pictures stand in the parts, or in `processor_kwargs["images"]`. `tokenize` and `return_dict` are
        False by default. Raises a ValueError or TypeError for no conversation, or one that the template refuses.
        """
        if self.is_stage1:
            raise ValueError("this is a stage-1 processor: without the LM's tokenizer there are no prompts")
        batch, is_batch = conversations_of(conversation)
        if not all(batch):
            raise ValueError("the conversation is empty")
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask is not supported: LorgnetteCollator makes labels")
        kwargs.pop("sanitize_control_tokens", None)  # this processor always does
        tokenize, return_dict = kwargs.pop("tokenize", False), kwargs.pop("return_dict", False)
        processor_kwargs = kwargs.pop("processor_kwargs", None) or {}
        call_kwargs = {name: kwargs.pop(name) for name in _KNOWN & kwargs.keys()} | processor_kwargs
        if call_kwargs.get("return_tensors") == "auto":
            del call_kwargs["return_tensors"]
        texts = [render(self.tokenizer, messages, chat_template, **kwargs) for messages in batch]
        if not tokenize:
            return texts if is_batch else texts[0]
        images = [images_in(messages) for messages in batch]
        call_kwargs.setdefault("images", images if any(images) else None)
        call_kwargs.setdefault("queries", [query_in(messages) for messages in batch])
        features = self(text=texts, **call_kwargs)
        return features if return_dict else features["input_ids"]

    def encode_example(self, output: str | None, **prompt: Any) -> tuple[list[int], list[int]]:
        """Token ids of a prompt, as at inference, and of its answer; needs the package, see `assembly.examples`."""
        return from_package("assembly.examples", "encode_example").encode_example(self, output, **prompt)

    def encode_answer(self, output: str) -> list[int]:
        """Token ids of an answer behind its prompt, with those that end it: the template's end of turn, or EOS."""
        space, end = answer_frame(self.tokenizer)
        return encode(self.tokenizer, space + escape_special_tokens(self.tokenizer, output), continues=True) + end

    def encode_prompt(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with `num_query_tokens` placeholders for each `<image>` that is markup."""
        ids = encode(self.tokenizer, prompt)
        ids = with_start(self.tokenizer, ids) if add_special_tokens else ids
        repeats = {self.image_token_id: self.num_query_tokens}
        return [token for token in ids for _ in range(repeats.get(token, 1))]

    def __call__(
        self, images: Any = None, text: Any = None, *, queries: Any = None, timeout: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Make what the model reads of B prompts and the N images in them.

        Args:
            images: an image, see [`load_image`], a list in the order of the `<image>` in the texts, or a list a text.
            text: a prompt or B of them, in stage 1 the Q-Former's texts; by default [`build_prompt`]'s, one an image.
            queries: what is asked, or B of them, where `text` is left out, and for a Q-Former that reads instructions.
            timeout: seconds for the download of an image.
            kwargs: as processors have them; truncation takes words, never placeholders.

        Returns:
            `input_ids`, `attention_mask` `(B, S)`; for images `pixel_values` `(N, 3, H, W)` and what else the image
            processor gives; for a Q-Former with instructions `qformer_input_ids`, `qformer_attention_mask` `(N, T)`.

        Raises a ValueError for nothing given, images and `<image>` that do not match, too little room for the images;
        with the package a TypeError for a keyword that nothing here reads; for what is no image, see [`load_image`].
        """
        if IN_PACKAGE:
            from_package("assembly.processor_keywords", "").check_keywords(self, kwargs, _KNOWN)
        if images is None and text is None:
            raise ValueError("neither images nor text given")
        offsets, types = (kwargs.pop(f"return_{n}", False) for n in ("text_replacement_offsets", "mm_token_type_ids"))
        own = self.tokenizer.init_kwargs
        merged = self._merge_kwargs(processing_utils.ProcessingKwargs, tokenizer_init_kwargs=own, **kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        rows, are_nested = ([], False) if images is None else _rows_of(images)
        if text is None and not all(rows):
            raise ValueError(f"row {rows.index([])} has an empty list of images, and no text")
        flat = [image for row in rows for image in row]
        if self.is_stage1:
            features = {} if text is None else self.encode_for_qformer(texts_of(text, "text"), **text_kwargs)
        else:
            texts = rows if text is None else texts_of(text, "text")
            asked = self._queries(queries, len(texts))
            if text is None:
                texts = [self.build_prompt(query, num_images=len(row)) for query, row in zip(asked, rows, strict=True)]
            ids = [self.encode_prompt(prompt, text_kwargs.get("add_special_tokens", True)) for prompt in texts]
            wanted = [row.count(self.image_token_id) // self.num_query_tokens for row in ids]
            _check_counts([len(row) for row in rows], are_nested, wanted)
            features = self._pad(ids, **text_kwargs)
            if types:
                features["mm_token_type_ids"] = self.create_mm_token_type_ids(features["input_ids"])
            if flat and self.qformer_tokenizer is not None:
                if text is not None and queries is None:
                    raise ValueError("the Q-Former reads the query too: say with queries= what is asked in text=")
                asked = [query for query, count in zip(asked, wanted, strict=True) for _ in range(count)]
                encoded = self.encode_for_qformer(asked, padding=True)
                features |= {f"qformer_{name}": value for name, value in encoded.items()}
        if flat:
            loaded, layout = [], images_kwargs.pop("input_data_format", None)
            for position, image in enumerate(flat):
                with error_context(f"image {position}"):
                    loaded.append(self.load_image(image, timeout, layout))
            features |= self.encode_images(loaded, **images_kwargs)
        features = BatchFeature(features, tensor_type=text_kwargs.get("return_tensors"))
        if offsets and not self.is_stage1:
            replacement = IMAGE_TOKEN * self.num_query_tokens
            offsets = [replacement_offsets(self.tokenizer, prompt, replacement) for prompt in texts]
            features["text_replacement_offsets"] = offsets
        return features

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Any] | None = None, **_: Any) -> Any:
        """How many placeholders images of these sizes take: each `num_query_tokens`. vLLM asks for it."""
        count = len(image_sizes or ())
        return processing_utils.MultiModalData([self.num_query_tokens] * count, num_image_patches=[1] * count)

    def load_image(self, source: Any, timeout: float | None = None, layout: Any = None) -> Image.Image:
        """[`load_image`] within this processor's limit of pixels, before and after resizing; raises what it does."""
        limit = self.max_image_pixels
        return load_image_for(self.image_processor, source, timeout=timeout, max_pixels=limit, layout=layout)

    def encode_images(self, images: list[Image.Image], **images_kwargs: Any) -> BatchFeature:
        """`pixel_values` `(N, 3, H, W)` and what else the image processor gives; a ValueError for a wrong range."""
        own = {name: getattr(self.image_processor, name, None) for name in ("do_rescale", "rescale_factor")}
        asked = own | {name: value for name, value in images_kwargs.items() if value is not None}
        takes_8_bits = asked == own and self.image_processor.do_normalize is False
        were_floats = any(image.info.get(WERE_FLOATS) for image in images)
        if (asked["do_rescale"] is False or asked["rescale_factor"] == 1) and (were_floats or not takes_8_bits):
            rescaling = from_package("assembly.rescaling", "an image processor that does not rescale")
            images_kwargs |= rescaling.rescaling_of(self.image_processor, images, images_kwargs)
        return self.image_processor(images, **images_kwargs)

    def _queries(self, queries: str | Sequence[str] | None, rows: int) -> list[str]:
        if queries is None or isinstance(queries, str):
            return [self.query if queries is None else queries] * rows
        if len(queries) != rows:
            raise ValueError(f"{len(queries)} queries were given for {rows} rows")
        return texts_of(queries, "queries")

    def encode_for_qformer(self, texts: list[str], **text_kwargs: Any) -> dict[str, Any]:
        """`input_ids` and `attention_mask` of the Q-Former's texts; a ValueError for one that is too long for it."""
        for text in texts:
            check_unicode(text)
        text_kwargs = {"return_token_type_ids": False, "split_special_tokens": True} | text_kwargs
        encoded = self.qformer_tokenizer(texts, return_attention_mask=True, **text_kwargs)
        longest, limit = max(map(len, encoded["input_ids"])), self.qformer_tokenizer.model_max_length
        if longest > limit:
            raise ValueError(f"a text has {longest} tokens; the Q-Former takes {limit}")
        return dict(encoded)

    def _pad(
        self, rows: list[list[int]], padding: Any = False, truncation: Any = None, max_length: Any = None, **kwargs: Any
    ) -> dict[str, list[list[int]]]:
        if max_length is None and self.tokenizer.model_max_length < 10**9:  # 1e30 stands for "not known"
            max_length = self.tokenizer.model_max_length
        truncates = truncation not in (False, None, "do_not_truncate") and max_length is not None
        if truncates and max(map(len, rows)) > max_length:
            rows = from_package("assembly.truncation", "truncation").truncated(self.tokenizer, rows, max_length)
        if padding == "max_length" and max_length is None:
            raise ValueError('padding="max_length" needs a max_length; the tokenizer knows of none')
        settings = (padding, max_length, kwargs.get("pad_to_multiple_of"), kwargs.get("padding_side"))
        return dict(self.tokenizer.pad({"input_ids": rows}, *settings, return_attention_mask=True, verbose=False))

    @property
    def model_input_names(self) -> list[str]:
        words, instructs = ["input_ids", "attention_mask"], not (self.qformer_tokenizer is None or self.is_stage1)
        return words + self.image_processor.model_input_names + [f"qformer_{name}" for name in words if instructs]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    def _own_tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        own = {name: getattr(self, name) for name in _TOKENIZERS[self.is_stage1 :]}  # stage 1's first is its second
        return {name: tokenizer for name, tokenizer in own.items() if tokenizer is not None}

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds; null stands for a tokenizer that this processor lacks."""
        absent = {name: None for name in _TOKENIZERS if name not in self._own_tokenizers()}
        return {**super().to_dict(), **absent, "auto_map": {"AutoProcessor": AUTO_PROCESSOR}}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save into a folder, with the code with which `AutoProcessor` loads it; arguments as `ProcessorMixin`'s."""
        (folder := Path(save_directory)).mkdir(parents=True, exist_ok=True)
        for name, tokenizer in self._own_tokenizers().items():
            tokenizer.save_pretrained(folder if name == "tokenizer" else folder / name)
        self.to_json_file(folder / PROCESSOR_NAME)
        save_code(folder, "lorgnette_retrieval" if self.is_stage1 else "lorgnette")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / PROCESSOR_NAME)]

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        source, fields = pretrained_model_name_or_path, processor_dict or {}
        kwargs = {name: value for name, value in kwargs.items() if name not in _FIELDS}
        subfolder = kwargs.pop("subfolder", "")
        parts: list[Any] = [AutoImageProcessor.from_pretrained(source, subfolder=subfolder, **kwargs)]
        for name, folder in zip(_TOKENIZERS, (subfolder, f"{subfolder}/{_TOKENIZERS[1]}".strip("/")), strict=True):
            is_absent = fields.get(name, "present") is None
            parts.append(None if is_absent else AutoTokenizer.from_pretrained(source, subfolder=folder, **kwargs))
        return parts


def _is_list(item: Any) -> bool:
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return item.ndim == 4
    return isinstance(item, Sequence) and not isinstance(item, (str, bytes, bytearray, memoryview))


def _rows_of(images: Any) -> tuple[list[list[Any]], bool]:
    """Images by row, and whether they were given so; where not, each image is a row of its own."""
    items = list(images) if _is_list(images) else [images]
    if not items:
        raise ValueError("images is an empty list")
    if not any(map(_is_list, items)):
        return [[item] for item in items], False
    for position, item in enumerate(items):
        if item is not None and not _is_list(item):
            raise ValueError(f"images mixes lists and single images: item {position} is a {type(item).__name__}")
    return [[] if item is None else list(item) for item in items], True


def _check_counts(given: list[int], are_nested: bool, wanted: list[int]) -> None:
    """Raises a ValueError where a row, or all rows whose images are in one list, have another number of `<image>`."""
    if not are_nested:
        given, wanted = [sum(given)], [sum(wanted)]
    for row, (has, wants) in enumerate(zip_longest(given, wanted, fillvalue="no")):
        if has != wants:
            counts = f"{wants} <image> in the text, {has} images given"
            where = f"row {row}" if are_nested else "all rows"
            raise ValueError(f"{where}: {counts}: each image needs its <image> in the text")
