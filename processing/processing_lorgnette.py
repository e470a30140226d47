"""`LorgnetteProcessor`: pictures and words in, what the model's `forward` reads out."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)  # the top level's wants torchvision in 5.17
from transformers.processing_utils import (
    AudioKwargs,
    ImagesKwargs,
    MultiModalData,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
    VideosKwargs,
)
from transformers.utils import PROCESSOR_NAME

from ..configuration.backbone_sources import (
    from_pretrained_arguments,
    load_part,
    load_qformer_tokenizer,
    load_tokenizer,
)
from ..configuration.configuration_lorgnette import AUTO_PROCESSOR, MAX_QUERY_TOKENS, save_code
from .blip2_prompts import BLIP2_TEMPLATE
from .conversations import conversations_of, flatten, images_in, query_in
from .image_loading import MAX_IMAGE_PIXELS, laid_out, load_image_for, naming, read_web_image, rescaling_of
from .image_rows import match_images, rows_of, texts_of
from .prompt_encoding import (
    IMAGE_TOKEN,
    answer_frame,
    check_unicode,
    encode,
    image_positions,
    remembered,
    render,
    truncate,
    with_start,
    writes_time,
)
from .tokenizer_preparation import prepare_tokenizer, refuse_own_class


_TOKENIZERS = ("tokenizer", "qformer_tokenizer")
_FIELDS = ("num_query_tokens", "system_prompt", "query", "chat_template", "max_image_pixels")
_CALL_KWARGS = {
    *TextKwargs.__annotations__,
    *ImagesKwargs.__annotations__,
    *ProcessingKwargs.__annotations__,
    "common_kwargs",
}
_OPTIONS_OF_OTHERS = {*VideosKwargs.__annotations__, *AudioKwargs.__annotations__} - _CALL_KWARGS
_OTHER_MODALITIES = ("videos", "audio", "audios", "videos_kwargs", "audio_kwargs")
_MEANT = dict.fromkeys(("query", "prompt", "question"), "queries") | {"video": "videos", "image": "images"}
_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")
# a tokenizer's, which are read in stage 1 alone
_UNREAD = {f"return_{name}" for name in ("overflowing_tokens", "special_tokens_mask", "offsets_mapping", "length")}
_UNREAD |= {"return_token_type_ids", "text_pair", "text_target", "text_pair_target"}


def _is_nothing(value: Any) -> bool:
    """Whether there is nothing in it, as where a program gives each row's list of videos and no row has any."""
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_nothing, value))
    return value is None


class LorgnetteProcessor(ProcessorMixin):
    """The ViT's image processor, the LM's tokenizer, and the prompt that both training and use are given.

    One `<image>` in a prompt stands for one image and becomes `num_query_tokens` placeholders. In `text=` it is markup;
    in a query, a system prompt, an output and the text parts of messages it is plain text, and so are the LM's special
    tokens. Prompts carry BOS where the LM's tokenizer adds one, once, and never EOS. Batches are padded on the left,
    for generation; [`LorgnetteCollator`] pads on the right.

    Args:
        image_processor: the ViT's own.
        tokenizer: the LM's. It is copied before it is given `<image>` (the next free id) and, where it has no pad
            token, its EOS as one. None in stage 1, where texts go to the Q-Former alone: `processor.tokenizer` is its
            tokenizer then, since Trainer asks every processor for one.
        qformer_tokenizer: the Q-Former's, for stage 1 and for instructions as InstructBLIP has them.
        num_query_tokens: soft tokens, and so placeholders, per image.
        system_prompt: what a prompt's system message says; None leaves it to the chat template.
        query: what a prompt asks, where nothing else is asked.
        chat_template: Jinja; the tokenizer's own by default.
        max_image_pixels: a picture with more is refused before it is decoded. Pillow's own limits hold as well.

    Raises:
        ValueError: no tokenizer, one without both pad and EOS token, a part whose class is not transformers' own,
            `num_query_tokens` or `max_image_pixels` below 1, more queries than can be meant.
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
            raise ValueError(f"num_query_tokens is {num_query_tokens}; more than {MAX_QUERY_TOKENS} cannot be meant")
        refuse_own_class("image processor", image_processor)
        refuse_own_class("tokenizer", tokenizer)
        refuse_own_class("Q-Former's tokenizer", qformer_tokenizer)
        if tokenizer is not None:
            tokenizer = prepare_tokenizer(tokenizer)
        super().__init__(image_processor, tokenizer or qformer_tokenizer, qformer_tokenizer)
        if chat_template is not None:
            self.chat_template = chat_template
        self.num_query_tokens = num_query_tokens
        self.system_prompt = system_prompt
        self.query = query
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
        """Make a processor of the backbones' own parts.

        Args:
            vision: the ViT: Hub id, local folder, or its image processor.
            text: the LM: Hub id, local folder, `.gguf` file, or its tokenizer. None in stage 1.
            qformer: where the Q-Former's tokenizer comes from: the same kinds.
            num_query_tokens, system_prompt, query: see the class.
            vision_revision, text_revision, qformer_revision: branch, tag or commit on the Hub.

        Raises:
            ValueError: see the class. `OSError` for a backbone that cannot be found, as transformers has it.
        """
        if isinstance(vision, (str, Path)):
            name, keywords = from_pretrained_arguments(vision, vision_revision)
            vision = load_part(AutoImageProcessor, "image processor", name, **keywords)
        return cls(
            vision,
            load_tokenizer(text, text_revision),
            load_qformer_tokenizer(qformer, qformer_revision),
            num_query_tokens=num_query_tokens,
            system_prompt=system_prompt,
            query=query,
        )

    @classmethod
    def from_blip2(cls, source: str | Path, *, query: str = "", revision: str | None = None) -> "LorgnetteProcessor":
        """The processor of a `Blip2ForConditionalGeneration`, with prompts as BLIP-2 has them: pictures, BOS, words.

        Args:
            source: Hub id or local folder, with its image processor and tokenizer.
            query: what is asked where nothing else is; BLIP-2 was trained on `"Question: … Answer:"`, and on no words
                at all for a caption.
            revision: branch, tag or commit on the Hub.
        """
        name, keywords = from_pretrained_arguments(source, revision)
        return cls(
            load_part(AutoImageProcessor, "image processor", name, **keywords),
            load_tokenizer(source, revision),
            num_query_tokens=AutoConfig.from_pretrained(name, **keywords).num_query_tokens,
            query=query,
            chat_template=BLIP2_TEMPLATE,
        )

    # ------------------------------------------------------------------------------------------------ prompts

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
        """The LM tokenizer's, saved with it; None where it has none and prompts are plain."""
        tokenizer = self.__dict__.get("tokenizer")
        return None if tokenizer is None else tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        if self.__dict__.get("tokenizer") is not None:
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

        Where the words hold control tokens, the string marks them with Unicode noncharacters, which `processor(text=…)`
        understands.

        Args:
            query: this processor's `query` by default; `""` for none.
            system: this processor's `system_prompt` by default; `""` for none.
            output: the answer; without one the prompt ends where the LM is to answer.
            num_images: how many images are asked about.

        Raises:
            ValueError: the template refuses it (some know no system message: put it in the query then).
            TypeError: a part that is no string.
        """
        query, system = self._asked(query, system)
        if output is not None and not isinstance(output, str):
            raise TypeError(f"output is a {type(output).__name__}; a string is needed")
        asked = [{"type": "text", "text": query}] if query else []
        messages = [{"role": "user", "content": asked + [{"type": "image"}] * num_images}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        if output is not None:
            messages.append({"role": "assistant", "content": output})
        return self.apply_chat_template(messages, add_generation_prompt=output is None)

    def _asked(self, query: str | None, system: str | None) -> tuple[str, str | None]:
        for name, value in (("query", query), ("system", system)):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} is a {type(value).__name__}; a string is needed")
        return self.query if query is None else query, self.system_prompt if system is None else system

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | list[list[int]] | torch.Tensor | BatchFeature:
        """As `ProcessorMixin.apply_chat_template`, for the templates of text-only LMs, and for LMs without any.

        Args:
            conversation: messages, or a list of such lists; [`messages_of`] says in what else they may be. Their
                contents are strings or lists of `{"type": "text", "text": …}` and `{"type": "image"}`; a picture stands
                under `image`, `url`, `path` or `base64`, or comes in `processor_kwargs["images"]`.
            chat_template: Jinja, or the name of one of the tokenizer's; its default one by default.
            tokenize: give token ids, not a string, and process the images.
            return_dict: give all that the model reads (a `BatchFeature`), not only `input_ids`.
            return_tensors, processor_kwargs: passed on to the processor's call.
            kwargs: `add_generation_prompt`, `continue_final_message`, `tools` … for the template.

        Raises:
            ValueError: an empty conversation, a part of another type, a template that refuses the conversation; for
                TypeError see [`messages_of`].
        """
        batch, is_batch = conversations_of(conversation)
        if not all(batch):
            raise ValueError("the conversation is empty")
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask is not supported: LorgnetteCollator makes labels")
        kwargs.pop("sanitize_control_tokens", None)  # it always does
        call_kwargs = {name: kwargs.pop(name) for name in _CALL_KWARGS & kwargs.keys()} | (processor_kwargs or {})
        tokenizer = self._lm_tokenizer()
        prompts = [
            render(tokenizer, flatten(tokenizer, messages), chat_template=chat_template, **kwargs) for messages in batch
        ]
        if not tokenize:
            return prompts if is_batch else prompts[0]
        images = [images_in(messages) for messages in batch]
        call_kwargs.setdefault("images", images if any(images) else None)
        call_kwargs.setdefault("queries", [query_in(messages) for messages in batch])
        if return_tensors not in (None, "auto"):
            call_kwargs["return_tensors"] = return_tensors
        features = self(text=prompts, **call_kwargs)
        return features if return_dict else features["input_ids"]

    def encode_example(
        self,
        output: str | None,
        *,
        query: str | None = None,
        system: str | None = None,
        num_images: int = 1,
        messages: list[dict[str, Any]] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Token ids of a training example: of the prompt exactly as it is at inference, and of what is to be learnt.

        Args:
            output: the answer. The ids that end it follow it: the template's end of turn, or EOS. None: not known yet.
            query, system, num_images: as in [`build_prompt`].
            messages: the conversation before the answer, in place of the three.

        Returns:
            The prompt's ids, placeholders and all, and the answer's (none where it is not known).

        Raises:
            ValueError: the template refuses the conversation, or does not show where an answer ends.
        """
        tokenizer = self._lm_tokenizer()
        if messages is None:
            prompt = self._prompt_ids(*self._asked(query, system), num_images)
        else:
            prompt = self._encode_prompt(self.apply_chat_template(messages, add_generation_prompt=True))
        if output is None:
            return prompt, []
        lead, end = answer_frame(tokenizer)
        answer = flatten(tokenizer, [{"content": output}])[0]["content"]
        return prompt, encode(tokenizer, lead + answer, continues=True) + end

    def _prompt_ids(self, query: str, system: str | None, num_images: int) -> list[int]:
        """Of a prompt that [`build_prompt`] writes: mostly one and the same for all rows."""

        def made() -> list[int]:
            return self._encode_prompt(self.build_prompt(query, system or "", num_images=num_images))

        if writes_time(self.tokenizer):
            return made()
        words = (query, system, num_images, self.num_query_tokens)
        return list(remembered(self.tokenizer, words, made))

    def _encode_prompt(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        ids = encode(self.tokenizer, prompt)
        if add_special_tokens:
            ids = with_start(self.tokenizer, ids)
        image_token_id, expanded = self.image_token_id, []
        for token in ids:
            expanded += [token] * (self.num_query_tokens if token == image_token_id else 1)
        return expanded

    # ------------------------------------------------------------------------------------------------ calling

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        queries: str | Sequence[str] | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make what the model reads of B prompts and the N images in them.

        Args:
            images: an image ([`load_image`] says what counts as one), a list of them in the order of their `<image>` in
                the texts, or a list of lists, one a text.
            text: a prompt or a list of B. Without it [`build_prompt`] writes one for each image, or list of images. In
                stage 1 these are the Q-Former's texts and hold no placeholders.
            queries: what is asked, or a list of B, where `text` is left out; and what the Q-Former is told, where it
                takes instructions. This processor's `query` by default.
            timeout: seconds for the download of an image.
            kwargs: as processors have them: `return_tensors`, `padding`, `padding_side`, `truncation`, `max_length`, …
                Truncation takes from the words, see [`truncate`], never from an image's placeholders.
                `return_text_replacement_offsets` says where in `text` each `<image>` stands, and what it stands for, as
                `ProcessorMixin.get_text_with_replacements` does; `return_mm_token_type_ids` gives `(B, S)` with 1 at
                placeholders and 0 elsewhere. vLLM asks for them.

        Returns:
            `input_ids` and `attention_mask` `(B, S)`; for images `pixel_values` `(N, 3, H, W)` and what else the image
            processor gives (`pixel_attention_mask`, `spatial_shapes`); for a Q-Former that takes instructions
            `qformer_input_ids` and `qformer_attention_mask` `(N, T)`.

        Raises:
            ValueError: nothing given, an empty list, `text` without `queries` where the Q-Former reads those, images
                and `<image>` that do not match (with the row and both counts), too little room for the images, an
                image that is none; for OSError and TypeError see [`load_image`].
            TypeError: a keyword that no processor of these parts has, `videos` and `audio` among them.
        """
        self._check_keywords(kwargs)
        if images is None and text is None:
            raise ValueError("neither images nor text given")
        return_offsets = kwargs.pop("return_text_replacement_offsets", False)
        return_types = kwargs.pop("return_mm_token_type_ids", False)
        merged = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        rows, sorted_by_caller = ([], False) if images is None else rows_of(images)
        texts = None if text is None else texts_of(text, "text")

        if texts is None and not all(rows):
            raise ValueError(f"row {rows.index([])} has an empty list of images, and no text")

        features: dict[str, Any] = {}
        if self.is_stage1:
            if texts is not None:
                features.update(self.encode_for_qformer(texts, **text_kwargs))
            flat = [image for row in rows for image in row]
        else:
            if texts is None:
                asked = self._queries(queries, len(rows))
                texts = [self.build_prompt(query, num_images=len(row)) for query, row in zip(asked, rows, strict=True)]
            ids = [self._encode_prompt(prompt, text_kwargs.get("add_special_tokens", True)) for prompt in texts]
            counts = [row.count(self.image_token_id) // self.num_query_tokens for row in ids]
            flat = match_images(rows, sorted_by_caller, counts)
            features.update(self._pad(ids, **text_kwargs))
            if return_types:
                features["mm_token_type_ids"] = [
                    [int(token == self.image_token_id) for token in row] for row in features["input_ids"]
                ]
            if flat and self.qformer_tokenizer is not None:
                if text is not None and queries is None:
                    raise ValueError("the Q-Former reads the query too: say with queries= what is asked in text=")
                asked = zip(self._queries(queries, len(texts)), counts, strict=True)
                told = [query for query, count in asked for _ in range(count)]
                instructions = self.encode_for_qformer(told, padding=True)
                features.update({f"qformer_{name}": value for name, value in instructions.items()})
        if flat:
            loaded, layout = [], images_kwargs.pop("input_data_format", None)
            for position, image in enumerate(flat):
                with naming(f"image {position}"):
                    loaded.append(self.load_image(laid_out(image, layout), timeout))
            features.update(self.encode_images(loaded, **images_kwargs))
        features = BatchFeature(features, tensor_type=text_kwargs.get("return_tensors"))
        if return_offsets and not self.is_stage1:
            features["text_replacement_offsets"] = [self._replacement_offsets(prompt) for prompt in texts]
        return features

    def _check_keywords(self, kwargs: dict[str, Any]) -> None:
        """Raises a TypeError that names the first keyword which nothing here reads, and what may have been meant."""
        known = _CALL_KWARGS | set(getattr(self.image_processor.valid_kwargs, "__annotations__", ()))
        for name, value in kwargs.items():
            if name in _OPTIONS_OF_OTHERS:  # which programs pass on with pictures alone
                continue
            if name in _OTHER_MODALITIES:
                if not _is_nothing(value):
                    raise TypeError(f"{name} was given, and {type(self).__name__} takes images and text alone")
            elif name not in known:
                near = get_close_matches(name, {*known, "queries", "images", "text", "timeout"}, n=1)
                meant = _MEANT.get(name, near[0] if near else None)
                meant = f": was {meant} meant?" if meant else ""
                raise TypeError(f"{type(self).__name__} knows no keyword {name!r}{meant}")
            elif name in _UNREAD and value not in (None, False) and not self.is_stage1:
                raise TypeError(f"{name} was given, and {type(self).__name__} does not read it")
            elif name in _GROUPS:
                self._check_keywords(value or {})

    def _replacement_offsets(self, prompt: str) -> list[dict[str, Any]]:
        """Where each `<image>` of a prompt stands, before and after it is expanded: characters."""
        replacement, found, grown = IMAGE_TOKEN * self.num_query_tokens, [], 0
        for start in image_positions(self.tokenizer, prompt):
            end = start + len(IMAGE_TOKEN)
            new_span = (start + grown, start + grown + len(replacement))
            found.append({"type": "image", "span": (start, end), "new_span": new_span})
            found[-1] |= {"text": IMAGE_TOKEN, "replacement": replacement}
            grown += len(replacement) - len(IMAGE_TOKEN)
        return found

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Any] | None = None, **_: Any) -> MultiModalData:
        """How many placeholders images of these sizes take: each `num_query_tokens`. vLLM asks for it."""
        count = 0 if image_sizes is None else len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_query_tokens] * count, num_image_patches=[1] * count)

    def load_image(self, source: Any, timeout: float | None = None) -> Image.Image:
        """[`load_image`], and see to it that the image processor can take it; raises what [`load_image_for`] does."""
        return load_image_for(self.image_processor, source, timeout, self.max_image_pixels)

    def load_web_image(self, url: str, timeout: float | None = None) -> Image.Image:
        """[`load_image`] of a URL that somebody else names; raises what it and [`read_web_image`] do."""
        return self.load_image(read_web_image(url, timeout))

    def encode_images(self, images: list[Image.Image], **images_kwargs: Any) -> BatchFeature:
        """`pixel_values` `(N, 3, H, W)`, and what else this image processor gives, for N loaded RGB images.

        Raises:
            ValueError: pictures of 8 bits, and `do_rescale=False`, see [`rescaling_of`].
        """
        return self.image_processor(images, **images_kwargs | rescaling_of(self.image_processor, images, images_kwargs))

    def _queries(self, queries: str | Sequence[str] | None, rows: int) -> list[str]:
        if queries is None or isinstance(queries, str):
            return [self.query if queries is None else queries] * rows
        if len(queries) != rows:
            raise ValueError(f"{len(queries)} queries were given for {rows} rows")
        return texts_of(queries, "queries")

    def encode_for_qformer(self, texts: list[str], **text_kwargs: Any) -> dict[str, Any]:
        """`input_ids` and `attention_mask` of the Q-Former's texts, in which special tokens are plain text.

        Raises:
            ValueError: a text longer than the Q-Former's tokenizer allows, or with half of a character in it.
        """
        for text in texts:
            check_unicode(text)
        tokenizer = self.qformer_tokenizer
        text_kwargs = {"return_token_type_ids": False, "split_special_tokens": True} | text_kwargs
        encoded = tokenizer(texts, return_attention_mask=True, **text_kwargs)
        longest = max(len(ids) for ids in encoded["input_ids"])
        if longest > tokenizer.model_max_length:
            raise ValueError(f"a text has {longest} tokens; the Q-Former takes {tokenizer.model_max_length}")
        return dict(encoded)

    def _pad(
        self,
        rows: list[list[int]],
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **_: Any,
    ) -> dict[str, list[list[int]]]:
        tokenizer = self.tokenizer
        if max_length is None and tokenizer.model_max_length < 10**9:  # transformers writes 1e30 for "not known"
            max_length = tokenizer.model_max_length
        if truncation and truncation != "do_not_truncate" and max_length is not None:
            for position, ids in enumerate(rows):
                with naming(f"row {position}"):
                    rows[position] = truncate(tokenizer, ids, max_length, self.image_token_id)
        width = 0
        if padding and padding != "do_not_pad":
            width = max(map(len, rows))
            if padding == "max_length":
                if max_length is None:
                    raise ValueError('padding="max_length" needs a max_length; the tokenizer knows of none')
                width = max_length
            width += -width % (pad_to_multiple_of or 1)
        left = (padding_side or tokenizer.padding_side) == "left"
        ids, mask = [], []
        for row in rows:
            pad = [tokenizer.pad_token_id] * (width - len(row))
            ids.append(pad + row if left else row + pad)
            mask.append([0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad))
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", *self.image_processor.model_input_names]
        if self.qformer_tokenizer is not None and not self.is_stage1:
            names += ["qformer_input_ids", "qformer_attention_mask"]
        return names

    def decode(self, *args: Any, **kwargs: Any) -> str | list[str]:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def _lm_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.is_stage1:
            raise ValueError("this is a stage-1 processor: without the LM's tokenizer there are no prompts")
        return self.tokenizer

    # ------------------------------------------------------------------------------------------------ saving

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    def _own_tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        own = {name: getattr(self, name) for name in _TOKENIZERS[self.is_stage1 :]}  # stage 1's first is its second
        return {name: tokenizer for name, tokenizer in own.items() if tokenizer is not None}

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds; a tokenizer that is not there is null in it."""
        absent = {name: None for name in _TOKENIZERS if name not in self._own_tokenizers()}
        return {**super().to_dict(), **absent, "auto_map": {"AutoProcessor": AUTO_PROCESSOR}}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save into a folder from which `AutoProcessor` loads where lorgnette is not installed, with the code for it.

        Args:
            save_directory: made where it does not exist.
            push_to_hub: upload it as well, to `repo_id` (the folder's name by default); `kwargs` are `push_to_hub`'s.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
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
        subfolder = kwargs.pop("subfolder", "")
        parts = [AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)]
        for name in _TOKENIZERS:
            own_folder = subfolder if name == "tokenizer" else f"{subfolder}/{name}".strip("/")
            absent = (processor_dict or {}).get(name, "present") is None
            parts.append(
                None
                if absent
                else AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=own_folder, **kwargs)
            )
        return parts
