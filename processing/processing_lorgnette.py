"""`LorgnetteProcessor`: pictures and words in, what the model's `forward` reads out."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, processing_utils
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # torchvision is optional here in 5.17
from transformers.utils import PROCESSOR_NAME

from ..configuration.configuration_lorgnette import (
    AUTO_PROCESSOR,
    IN_PACKAGE,
    MAX_QUERY_TOKENS,
    from_package,
    save_code,
)
from .image_loading import MAX_IMAGE_PIXELS, load_image_for, rescaling_of
from .prompt_encoding import (
    IMAGE_TOKEN,
    answer_frame,
    check_unicode,
    conversations_of,
    encode,
    error_context,
    escape_special_tokens,
    flatten,
    image_positions,
    images_in,
    is_prepared,
    query_in,
    render,
    texts_of,
    truncate,
    with_start,
)


_TOKENIZERS = ("tokenizer", "qformer_tokenizer")
_FIELDS = ("num_query_tokens", "system_prompt", "query", "chat_template", "max_image_pixels")
_PARTS = [vars(processing_utils)[f"{part}Kwargs"] for part in ("Text", "Images", "Processing", "Videos", "Audio")]
_KWARGS = {"common_kwargs"}.union(*(part.__annotations__ for part in _PARTS[:3]))
_IGNORED_KWARGS = {name for part in _PARTS[3:] for name in part.__annotations__}  # programs pass them with pictures
_OTHER_MODALITIES = ("videos", "audio", "audios", "videos_kwargs", "audio_kwargs")
_MEANT = dict.fromkeys(("query", "prompt", "question"), "queries") | {"video": "videos", "image": "images"}
_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")
# a tokenizer's, which are read in stage 1 alone
_UNREAD = {f"return_{name}" for name in ("overflowing_tokens", "special_tokens_mask", "offsets_mapping", "length")}
_UNREAD |= {"return_token_type_ids", "text_pair", "text_target", "text_pair_target"}
_ASSEMBLY = "assembly.processors"
Texts = str | Sequence[str] | None


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

    Raises:
        ValueError: no tokenizer, one without both pad and EOS token, a part of a class that is not transformers' own, a
            number out of range.
        ImportError: the tokenizer lacks `<image>`, a pad token or left padding, and lorgnette is not installed.
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
        if tokenizer is None and qformer_tokenizer is None:
            raise ValueError("a tokenizer is needed: the LM's, or in stage 1 the Q-Former's (qformer_tokenizer)")
        for name, value in (("num_query_tokens", num_query_tokens), ("max_image_pixels", max_image_pixels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it has to be a whole number of at least 1")
        if num_query_tokens > MAX_QUERY_TOKENS:
            raise ValueError(f"num_query_tokens is {num_query_tokens}; at most {MAX_QUERY_TOKENS} are allowed")
        if IN_PACKAGE:
            from_package(_ASSEMBLY, "").refuse_own_classes(image_processor, tokenizer, qformer_tokenizer)
        if tokenizer is not None and not is_prepared(tokenizer):
            tokenizer = from_package(_ASSEMBLY, "a tokenizer without <image>").prepare_tokenizer(tokenizer)
        super().__init__(image_processor, tokenizer or qformer_tokenizer, qformer_tokenizer)
        self.chat_template = self.chat_template if chat_template is None else chat_template
        self.num_query_tokens, self.system_prompt, self.query = num_query_tokens, system_prompt, query
        self.max_image_pixels = max_image_pixels

    @classmethod
    def from_backbones(
        cls,
        vision: str | Path | BaseImageProcessor,
        text: str | Path | PreTrainedTokenizerBase | None,
        *,
        qformer: str | Path | PreTrainedTokenizerBase | None = None,
        num_query_tokens: int = 32,
        system_prompt: str | None = None,
        query: str = "Describe the picture.",
        vision_revision: str | None = None,
        text_revision: str | None = None,
        qformer_revision: str | None = None,
    ) -> "LorgnetteProcessor":
        """Make a processor of the backbones' own parts; needs the package, see `lorgnette.assembly.processors`."""
        fields = {"num_query_tokens": num_query_tokens, "system_prompt": system_prompt, "query": query}
        revisions, assembly = (
            (vision_revision, text_revision, qformer_revision),
            from_package(_ASSEMBLY, "from_backbones"),
        )
        return assembly.from_backbones(cls, vision, text, qformer, revisions, **fields)

    @classmethod
    def from_blip2(cls, source: str | Path, *, query: str = "", revision: str | None = None) -> "LorgnetteProcessor":
        """Make the processor of a `Blip2ForConditionalGeneration`; needs the package, see `assembly.processors`."""
        return from_package(_ASSEMBLY, "LorgnetteProcessor.from_blip2").from_blip2(cls, source, query, revision)

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
        eos = self._lm_tokenizer().eos_token_id
        return sorted({answer_frame(self.tokenizer)[1][-1], *([] if eos is None else [eos])})

    def build_prompt(
        self, query: str | None = None, system: str | None = None, output: str | None = None, num_images: int = 1
    ) -> str:
        """Write `<SYSTEM> <QUERY> <IMAGE> <OUTPUT>` in the LM's chat template, or plainly, a part a line, without one.

        Args:
            query, system: this processor's by default; `""` for none. Noncharacters mark control tokens in them.
            output: the answer; without one the prompt ends where the LM is to answer.
            num_images: how many images the query is about.

        Raises a ValueError where the template refuses it (put `system` in the query), a TypeError for no string.
        """
        for name, value in (("query", query), ("system", system), ("output", output)):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} is a {type(value).__name__}; a string is needed")
        query, system = self.query if query is None else query, self.system_prompt if system is None else system
        words = [{"type": "text", "text": query}] if query else []
        messages = [{"role": "user", "content": words + [{"type": "image"}] * num_images}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        if output is not None:
            messages.append({"role": "assistant", "content": output})
        return self.apply_chat_template(messages, add_generation_prompt=output is None)

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> str | list[str] | list[list[int]] | torch.Tensor | BatchFeature:
        """As `ProcessorMixin.apply_chat_template`, for the templates of text-only LMs, and for LMs without any.

        Args:
            conversation: messages, or a list of such lists; their contents are strings or parts, see [`parts_of`].
                Pictures stand in the parts, or in `processor_kwargs["images"]`.
            chat_template, kwargs: as there; `tokenize` and `return_dict` are False by default.

        Raises a ValueError or TypeError for no conversation, see [`parts_of`], or one that the template refuses.
        """
        batch, is_batch = conversations_of(conversation)
        if not all(batch):
            raise ValueError("the conversation is empty")
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask is not supported: LorgnetteCollator makes labels")
        kwargs.pop("sanitize_control_tokens", None)  # this processor always does
        tokenize, return_dict = kwargs.pop("tokenize", False), kwargs.pop("return_dict", False)
        processor_kwargs = kwargs.pop("processor_kwargs", None) or {}
        call_kwargs = {name: kwargs.pop(name) for name in _KWARGS & kwargs.keys()} | processor_kwargs
        if call_kwargs.get("return_tensors") == "auto":
            del call_kwargs["return_tensors"]
        tokenizer = self._lm_tokenizer()
        flat = [flatten(tokenizer, messages) for messages in batch]
        texts = [render(tokenizer, messages, chat_template, **kwargs) for messages in flat]
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
        lead, end = answer_frame(self._lm_tokenizer())
        words = lead + escape_special_tokens(self.tokenizer, output)
        return encode(self.tokenizer, words, continues=True) + end

    def encode_prompt(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with `num_query_tokens` placeholders for each `<image>` that is markup."""
        ids = encode(self.tokenizer, prompt)
        ids = with_start(self.tokenizer, ids) if add_special_tokens else ids
        repeats = {self.image_token_id: self.num_query_tokens}
        return [token for token in ids for _ in range(repeats.get(token, 1))]

    def __call__(
        self, images: Any = None, text: Texts = None, *, queries: Texts = None, timeout: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Make what the model reads of B prompts and the N images in them.

        Args:
            images: an image, see [`load_image`], a list in the order of the `<image>` in the texts, or a list a text.
            text: a prompt or B of them, in stage 1 the Q-Former's texts; by default [`build_prompt`]'s, one an image.
            queries: what is asked, or B of them, where `text` is left out, and for a Q-Former that reads instructions.
            timeout: seconds for the download of an image.
            kwargs: as processors have them; truncation takes words, never placeholders. For vLLM,
                `return_text_replacement_offsets` says where in `text` each `<image>` stands, and
                `return_mm_token_type_ids` gives `(B, S)` with 1 at placeholders.

        Returns:
            `input_ids`, `attention_mask` `(B, S)`; for images `pixel_values` `(N, 3, H, W)` and what else the image
            processor gives; for a Q-Former with instructions `qformer_input_ids`, `qformer_attention_mask` `(N, T)`.

        Raises:
            ValueError: nothing given, images and `<image>` that do not match (with the row and both counts), too little
                room for the images; for an image that is none, and for OSError, see [`load_image`].
            TypeError: a keyword that nothing here reads, `videos` and `audio` among them.
        """
        self._check_keywords(kwargs)
        if images is None and text is None:
            raise ValueError("neither images nor text given")
        offsets, types = (kwargs.pop(f"return_{n}", False) for n in ("text_replacement_offsets", "mm_token_type_ids"))
        merged = self._merge_kwargs(_PARTS[2], tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        rows, sorted_by_caller = ([], False) if images is None else _rows_of(images)
        if text is None and not all(rows):
            raise ValueError(f"row {rows.index([])} has an empty list of images, and no text")
        features: dict[str, Any] = {}
        if self.is_stage1:
            if text is not None:
                features |= self.encode_for_qformer(texts_of(text, "text"), **text_kwargs)
            flat = [image for row in rows for image in row]
        else:
            if text is None:
                asked = zip(self._queries(queries, len(rows)), rows, strict=True)
                texts = [self.build_prompt(query, num_images=len(row)) for query, row in asked]
            else:
                texts = texts_of(text, "text")
            image_token_id, special = self.image_token_id, text_kwargs.get("add_special_tokens", True)
            ids = [self.encode_prompt(prompt, special) for prompt in texts]
            counts = [row.count(image_token_id) // self.num_query_tokens for row in ids]
            flat = _match_images(rows, sorted_by_caller, counts)
            features |= self._pad(ids, **text_kwargs)
            if types:
                features["mm_token_type_ids"] = [
                    [int(n == image_token_id) for n in row] for row in features["input_ids"]
                ]
            if flat and self.qformer_tokenizer is not None:
                if text is not None and queries is None:
                    raise ValueError("the Q-Former reads the query too: say with queries= what is asked in text=")
                asked = zip(self._queries(queries, len(texts)), counts, strict=True)
                encoded = self.encode_for_qformer([query for query, n in asked for _ in range(n)], padding=True)
                features |= {f"qformer_{name}": value for name, value in encoded.items()}
        if flat:
            loaded, layout = [], images_kwargs.pop("input_data_format", None)
            for position, image in enumerate(flat):
                with error_context(f"image {position}"):
                    loaded.append(self.load_image(image, timeout, layout))
            features |= self.encode_images(loaded, **images_kwargs)
        features = BatchFeature(features, tensor_type=text_kwargs.get("return_tensors"))
        if offsets and not self.is_stage1:
            features["text_replacement_offsets"] = [self._replacement_offsets(prompt) for prompt in texts]
        return features

    def _check_keywords(self, kwargs: dict[str, Any]) -> None:
        """Raises a TypeError for a keyword that nothing here reads, with the nearest that something reads."""
        accepted = {*_KWARGS, *getattr(self.image_processor.valid_kwargs, "__annotations__", ())}
        for name, value in kwargs.items():
            if name in _OTHER_MODALITIES and not _is_empty(value):
                raise TypeError(f"{name} was given, and {type(self).__name__} takes images and text alone")
            if name not in {*accepted, *_IGNORED_KWARGS, *_OTHER_MODALITIES}:
                near = get_close_matches(name, {*accepted, "queries", "images", "text", "timeout"}, n=1)
                meant = _MEANT.get(name, near[0] if near else None)
                hint = f": was {meant} meant?" if meant else ""
                raise TypeError(f"{type(self).__name__} knows no keyword {name!r}{hint}")
            if name in _UNREAD and value not in (None, False) and not self.is_stage1:
                raise TypeError(f"{name} was given, and {type(self).__name__} does not read it")
            if name in _GROUPS:
                self._check_keywords(value or {})

    def _replacement_offsets(self, prompt: str) -> list[dict[str, Any]]:
        """Where each `<image>` of a prompt stands, before and after it is expanded: characters."""
        replacement, offsets = IMAGE_TOKEN * self.num_query_tokens, []
        for number, start in enumerate(image_positions(self.tokenizer, prompt)):
            new_start = start + number * (len(replacement) - len(IMAGE_TOKEN))
            spans = {"span": (start, start + len(IMAGE_TOKEN)), "new_span": (new_start, new_start + len(replacement))}
            offsets.append({"type": "image", "text": IMAGE_TOKEN, "replacement": replacement, **spans})
        return offsets

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Any] | None = None, **_: Any) -> Any:
        """How many placeholders images of these sizes take: each `num_query_tokens`. vLLM asks for it."""
        count = 0 if image_sizes is None else len(image_sizes)
        patches = [1] * count
        return processing_utils.MultiModalData([self.num_query_tokens] * count, num_image_patches=patches)

    def load_image(self, source: Any, timeout: float | None = None, layout: Any = None) -> Image.Image:
        """[`load_image`] within this processor's limit of pixels, before and after resizing; raises what it does."""
        return load_image_for(self.image_processor, source, timeout, self.max_image_pixels, layout)

    def encode_images(self, images: list[Image.Image], **images_kwargs: Any) -> BatchFeature:
        """`pixel_values` `(N, 3, H, W)` and what else the image processor gives; raises what [`rescaling_of`] does."""
        return self.image_processor(images, **images_kwargs | rescaling_of(self.image_processor, images, images_kwargs))

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

    def _pad(self, rows: list[list[int]], **kwargs: Any) -> dict[str, list[list[int]]]:
        tokenizer, padding, truncation = self.tokenizer, kwargs.get("padding", False), kwargs.get("truncation", False)
        max_length = kwargs.get("max_length")
        if max_length is None and tokenizer.model_max_length < 10**9:  # 1e30 stands for "not known"
            max_length = tokenizer.model_max_length
        if truncation not in (False, None, "do_not_truncate") and max_length is not None:
            for position, ids in enumerate(rows):
                with error_context(f"row {position}"):
                    rows[position] = truncate(tokenizer, ids, max_length)
        if padding == "max_length" and max_length is None:
            raise ValueError('padding="max_length" needs a max_length; the tokenizer knows of none')
        kwargs = {name: kwargs[name] for name in ("pad_to_multiple_of", "padding_side") if name in kwargs}
        kwargs |= {"return_attention_mask": True, "verbose": False}
        return dict(tokenizer.pad({"input_ids": rows}, padding, max_length, **kwargs))

    @property
    def model_input_names(self) -> list[str]:
        words, instructs = ["input_ids", "attention_mask"], not (self.qformer_tokenizer is None or self.is_stage1)
        return words + self.image_processor.model_input_names + [f"qformer_{name}" for name in words if instructs]

    def _lm_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.is_stage1:
            raise ValueError("this is a stage-1 processor: without the LM's tokenizer there are no prompts")
        return self.tokenizer

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
        saved, asked = (processor_dict or {}).get("num_query_tokens"), kwargs.get("num_query_tokens")
        if None not in (saved, asked) and saved != asked:
            raise ValueError(
                f"{pretrained_model_name_or_path}: num_query_tokens is {saved} in its {PROCESSOR_NAME}, with which its "
                f"model was trained, and {asked} was asked for: leave it out, or build one anew with from_backbones"
            )
        kwargs = {name: value for name, value in kwargs.items() if name not in _FIELDS}
        source, subfolder = pretrained_model_name_or_path, kwargs.pop("subfolder", "")
        parts: list[Any] = [AutoImageProcessor.from_pretrained(source, subfolder=subfolder, **kwargs)]
        folders = (subfolder, f"{subfolder}/{_TOKENIZERS[1]}".strip("/"))
        for name, folder, side in zip(_TOKENIZERS, folders, ({"padding_side": "left"}, {}), strict=True):
            is_absent = (processor_dict or {}).get(name, "present") is None
            settings = {"subfolder": folder, **side, **kwargs}  # older saves do not say on which side they pad
            parts.append(None if is_absent else AutoTokenizer.from_pretrained(source, **settings))
        return parts


def _is_empty(value: Any) -> bool:
    """Whether there is nothing in it: None, or lists and dicts of nothing."""
    return all(map(_is_empty, value)) if isinstance(value, (list, tuple, dict)) else value is None


def _is_list(item: Any) -> bool:
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return item.ndim == 4
    return isinstance(item, Sequence) and not isinstance(item, (str, bytes, bytearray, memoryview))


def _rows_of(images: Any) -> tuple[list[list[Any]], bool]:
    """Images by row, and whether the caller has sorted them; where not, each image is a row of its own."""
    items = list(images) if _is_list(images) else [images]
    if not items:
        raise ValueError("images is an empty list")
    if not any(map(_is_list, items)):
        return [[item] for item in items], False
    for position, item in enumerate(items):
        if item is not None and not _is_list(item):
            raise ValueError(f"images mixes lists and single images: item {position} is a {type(item).__name__}")
    return [[] if item is None else list(item) for item in items], True


def _match_images(rows: list[list[Any]], sorted_by_caller: bool, wanted: list[int]) -> list[Any]:
    """All images in the order of their placeholders; each text has as many as `wanted` says, or a ValueError tells."""
    flat, counts = [image for row in rows for image in row], [len(row) for row in rows]
    if not sorted_by_caller:
        counts = wanted if len(flat) == sum(wanted) else [len(flat)] if len(wanted) == 1 else counts
    if len(counts) != len(wanted):
        texts = f"the {len(wanted)} texts have {sum(wanted)} <image> in all ({', '.join(map(str, wanted))})"
        lists = f" in {len(rows)} lists" if sorted_by_caller else ""
        raise ValueError(f"{texts}, and {len(flat)} images were given{lists}")
    for row, (has, wants) in enumerate(zip(counts, wanted, strict=True)):
        if has != wants:
            hint = ": each image needs its <image> in the text" if wants < has else ""
            raise ValueError(f"row {row}: {wants} <image> in the text, {has} images given{hint}")
    return flat
