"""Request bodies: `/v1/vision` and OpenAI's chat completions. Both become a [`Question`]."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from .fields import FormBool, FormInt, Temperature, TopP, only


MAX_IMAGES = 8
MAX_CHARACTERS = 50_000  # of all text; tokenizing more would take longer than answering
MAX_URL = 8192  # of http and https
MAX_STOPS = 4


@dataclass
class Question:
    """One parsed request, of either format.

    Args:
        messages: as `apply_chat_template` takes them, with `{"type": "image"}` for each picture; None for the prompt
            that the processor writes. If the last has pictures and no text, the processor's own query is used.
        prompt: the text, where there are no messages.
        images: the pictures' URLs, in order.
        adapter: the bridge's name; None for the first.
        use_lora, max_new_tokens, stream: see [`VisionRequest`].
        at_most: a limit that is lowered to the worker's instead of refused. None for no such limit.
        temperature, top_p, seed: see [`~lorgnette.serving.sampling.Sampler`]; a temperature of 0 is
            greedy decoding.
        stops: strings that end the answer and are not part of it.
    """

    messages: list[dict[str, Any]] | None
    prompt: str | None
    images: list[str] = field(default_factory=list)
    adapter: str | None = None
    use_lora: bool = True
    max_new_tokens: int | None = None
    stream: bool = False
    at_most: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: list[str] = field(default_factory=list)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _check_url(url: str) -> str:
    if not url.startswith("data:") and len(url) > MAX_URL:
        raise ValueError(f"{len(url)} characters are more than the {MAX_URL} that a URL may have")
    return url


def _check_text(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters are more than the {MAX_CHARACTERS} that are allowed")
    return text


class VisionRequest(_Strict):
    """`POST /v1/vision`: one picture, one question."""

    image_url: str = Field(description="http, https, or base64 as data:image/…;base64,…")
    prompt: str = Field(description="What is asked, plain text.")
    adapter: str | None = Field(None, description="A bridge's name; the model's own where it is left out, or empty.")
    use_lora: FormBool | None = Field(True, description="false: the language model answers without LoRA.")
    max_new_tokens: FormInt | None = Field(None, ge=1, description="At most so many as the worker allows.")
    stream: FormBool | None = Field(False, description="Server-sent events, piece by piece.")

    _url = field_validator("image_url")(_check_url)
    _text = field_validator("prompt")(_check_text)

    def question(self) -> Question:
        return Question(
            None,
            self.prompt,
            [self.image_url],
            self.adapter or None,
            self.use_lora is not False,
            self.max_new_tokens,
            bool(self.stream),
        )


class _ImageURL(_Strict):
    url: str
    detail: str | None = None

    _url = field_validator("url")(_check_url)


class _ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageURL


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[_ImagePart | _TextPart, Field(discriminator="type")]] | None
    name: str | None = None  # ignored
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role") != "assistant":
            raise ValueError("it is null, which an assistant's alone may be")
        return content

    def parts(self) -> list[_ImagePart | _TextPart]:
        return [_TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content or []


class _StreamOptions(_Strict):
    include_usage: FormBool = False
    include_obfuscation: Any = None


class _GenerationConfig(_Strict):
    """What `transformers chat` sends of a `GenerationConfig`: the fields that differ from its defaults."""

    do_sample: bool = False
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_new_tokens: int | None = Field(None, ge=1)
    transformers_version: Any = None

    @classmethod
    def parse(cls, value: Any) -> Any:
        """The non-null fields of its JSON."""
        try:
            fields = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is no JSON: {error}") from error
        return {name: one for name, one in fields.items() if one is not None} if isinstance(fields, dict) else fields


class ChatRequest(_Strict):
    """`POST /v1/chat/completions`, OpenAI's format: fields that would change nothing are accepted, others are refused.

    Without a temperature decoding is greedy, whatever `top_p` and `seed` say.
    """

    model: str = Field(description="A bridge's name; a worker with one bridge accepts any name.")
    messages: list[_Message] = Field(min_length=1)
    max_tokens: FormInt | None = Field(None, ge=1)
    max_completion_tokens: FormInt | None = Field(None, ge=1)
    stream: FormBool | None = False
    stream_options: _StreamOptions | None = None
    use_lora: FormBool | None = Field(True, description="Not OpenAI's: as in /v1/vision.")
    temperature: Temperature | None = Field(None, description="0, the default: greedy decoding.")
    top_p: TopP | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same answer.")
    stop: list[str] = Field([], max_length=MAX_STOPS, description="Or one string. The answer ends before the first.")
    generation_config: Annotated[_GenerationConfig, BeforeValidator(_GenerationConfig.parse)] | None = Field(
        None, description="transformers' own, as JSON: what `transformers chat` sends. Fields beside it win."
    )

    # OpenAI's fields that accept only the values that change nothing here
    audio: Annotated[Any, only()] = None
    frequency_penalty: Annotated[Any, only(0)] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    logit_bias: Annotated[Any, only({})] = None
    logprobs: Annotated[Any, only(False)] = None
    modalities: Annotated[Any, only(["text"])] = None
    n: Annotated[Any, only(1)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    tools: Annotated[Any, only([])] = None
    top_logprobs: Annotated[Any, only(0)] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None

    # OpenAI's fields that are ignored
    metadata: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError(f"stop string {value.index('')} has 0 characters; at least 1 is needed")
        return value

    @field_validator("messages")
    @classmethod
    def _bounded(cls, messages: list[_Message]) -> list[_Message]:
        parts = [part for message in messages for part in message.parts()]
        images = sum(isinstance(part, _ImagePart) for part in parts)
        texts = [part.text for part in parts if isinstance(part, _TextPart)]
        if texts or not images:  # a picture alone gets the processor's own query
            _check_text("".join(texts))
        if images > MAX_IMAGES:
            raise ValueError(f"{images} pictures are more than the {MAX_IMAGES} that are allowed")
        return messages

    def question(self) -> Question:
        images, messages = [], []
        for message in self.messages:
            content: list[dict[str, str]] = []
            for part in message.parts():
                if isinstance(part, _ImagePart):
                    images.append(part.image_url.url)
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": part.text})
            messages.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        config = self.generation_config or _GenerationConfig()
        return Question(
            messages,
            None,
            images,
            self.model,
            self.use_lora is not False,
            self.max_completion_tokens or self.max_tokens,
            bool(self.stream),
            at_most=config.max_new_tokens,
            temperature=config.temperature * config.do_sample if self.temperature is None else self.temperature,
            top_p=config.top_p if self.top_p is None else self.top_p,
            seed=self.seed,
            stops=self.stop,
        )


class LoadRequest(_Strict):
    """`POST /load_model`, as `transformers chat` sends it."""

    model: str
