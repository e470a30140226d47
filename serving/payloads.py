"""What callers send: the interface that sites have, and OpenAI's chat form. Both become a [`Question`]."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


MAX_IMAGES = 8
MAX_CHARACTERS = 50_000  # of all words; counting the tokens of more would take longer than answering
MAX_URL = 8192  # of http and https


@dataclass
class Question:
    """One request, whatever its form.

    Args:
        messages: as `apply_chat_template` takes them, with `{"type": "image"}` for each picture; None for the prompt
            that the processor writes.
        prompt: what is asked, without messages.
        images: the pictures' URLs, in order.
        adapter: the bridge's name; None for the first.
        use_lora, max_new_tokens, stream: see [`VisionRequest`].
    """

    messages: list[dict[str, Any]] | None
    prompt: str | None
    images: list[str] = field(default_factory=list)
    adapter: str | None = None
    use_lora: bool = True
    max_new_tokens: int | None = None
    stream: bool = False


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _check_url(url: str) -> str:
    if not url.startswith("data:") and len(url) > MAX_URL:
        raise ValueError(f"{len(url)} characters are more than the {MAX_URL} that a URL may have")
    return url


def _check_words(text: str) -> str:
    if not text.strip():
        raise ValueError("there are no words in it")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters are more than the {MAX_CHARACTERS} that are allowed")
    return text


class VisionRequest(_Strict):
    """`POST /v1/vision`: one picture, one question."""

    image_url: str = Field(description="http, https, or base64 as data:image/…;base64,…")
    prompt: str = Field(description="What is asked, plain text.")
    adapter: str | None = Field(None, description="A bridge's name; the model's own where it is left out.")
    use_lora: bool = Field(True, description="false: the language model answers without LoRA.")
    max_new_tokens: int | None = Field(None, ge=1, description="At most so many as the worker allows.")
    stream: bool = Field(False, description="Server-sent events, piece by piece.")

    _url = field_validator("image_url")(_check_url)
    _words = field_validator("prompt")(_check_words)

    def question(self) -> Question:
        return Question(
            None, self.prompt, [self.image_url], self.adapter, self.use_lora, self.max_new_tokens, self.stream
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
    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[_ImagePart | _TextPart, Field(discriminator="type")]]

    def parts(self) -> list[_ImagePart | _TextPart]:
        return [_TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class _StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """`POST /v1/chat/completions`, as OpenAI has it: what changes nothing here is taken, what would is refused."""

    model: str = Field(description="A bridge's name.")
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    use_lora: bool = Field(True, description="Not OpenAI's: as in /v1/vision.")
    temperature: float | None = Field(None, description="0: the likeliest token is taken.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: Literal[1] | None = None
    seed: int | None = None
    user: str | None = None

    @field_validator("temperature")
    @classmethod
    def _greedy(cls, value: float | None) -> float | None:
        if value:
            raise ValueError(f"it is {value:g}; the likeliest token is always taken here, as with 0")
        return value

    @field_validator("messages")
    @classmethod
    def _bounded(cls, messages: list[_Message]) -> list[_Message]:
        parts = [part for message in messages for part in message.parts()]
        _check_words("".join(part.text for part in parts if isinstance(part, _TextPart)))
        images = sum(isinstance(part, _ImagePart) for part in parts)
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
            messages.append({"role": message.role, "content": content})
        limit = self.max_completion_tokens or self.max_tokens
        return Question(messages, None, images, self.model, self.use_lora, limit, self.stream)
