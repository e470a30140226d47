"""A Gradio demo: a question about two pictures, the answers, and the attention maps behind them.

`lorgnette app` runs it. Every upload also holds it in `space/`, as a Space: `python app.py` there works without
lorgnette and loads the model that the README in that folder names.
"""

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from huggingface_hub import SpaceCard
from PIL import Image
from transformers import Pipeline, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, pipeline

from ..inspection.drawing import overlay, sample_picture
from ..inspection.maps import maps_of


MAX_CHARACTERS = 50_000  # tokenizing more would take longer than answering
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # no web font is downloaded
SETTINGS = {  # for `launch`
    "theme": gr.themes.Default(**FONTS),
    "footer_links": ["api", "gradio", "settings"],
    "max_file_size": "20mb",
    "share": False,
    "ssr_mode": False,
    "show_error": True,
}


def build(pipes: Mapping[str, Pipeline], name: str, max_new_tokens: int = 128) -> gr.Blocks:
    """Build the page.

    Args:
        pipes: an `image-to-text` pipeline for each bridge of one model, by the bridge's name. The model is in eval
            mode; from now on only the page uses it.
        name: the model's name in the title.
        max_new_tokens: limit for an answer.
    """
    bridges, (first, *_) = list(pipes), pipes.values()
    has_lora = False
    for bridge in reversed(bridges):  # the first is active at the end
        first.model.set_bridge(bridge)
        has_lora = has_lora or first.model.config.lora_config is not None
    with gr.Blocks(title=f"lorgnette: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"## {name}\nDrop a picture and ask. The model answers the same question for a second picture: "
            "answers that depend on the picture differ. Bright areas have high attention: first the cross-attention of "
            "all queries, then the attribution of each word of the answer."
        )
        with gr.Row():
            pictures = [_picture("Picture"), _picture("Another picture", sample_picture())]
        with gr.Row(equal_height=True):
            question = gr.Textbox(first.processor.query, label="Question", scale=3)
            bridge = gr.Radio(bridges, value=bridges[0], label="Bridge", visible=len(bridges) > 1, min_width=180)
            use_lora = _switch("use_lora", label="LoRA", visible=has_lora, min_width=180)
        button = gr.Button("Ask", variant="primary")
        outputs, gallery = [], {"show_label": False, "columns": 3, "interactive": False, "buttons": ["fullscreen"]}
        with gr.Row():
            for label in ("Answer", "Answer to the other picture"):
                with gr.Column(min_width=280):
                    outputs.append(gr.Textbox(label=label, interactive=False))
                    outputs.append(gr.Gallery(label=f"{label}: maps", height="max-content", **gallery))
        inputs = [*pictures, question, bridge, use_lora]
        answer = partial(ask, pipes, max_new_tokens)
        # otherwise all four outputs would show an error
        shown = {"show_progress": "minimal", "show_progress_on": outputs[0]}
        gr.on([button.click, question.submit], answer, inputs, outputs, api_name="ask", **shown)
    return page


def ask(
    pipes: Mapping[str, Pipeline],
    max_new_tokens: int,
    picture: str | None,
    other: str | None,
    question: str,
    bridge: str,
    use_lora: bool,
) -> Iterator[list[Any]]:
    """Answer one question for two pictures, one after the other.

    Args:
        picture, other: files; `other` may be None.

    Yields:
        so far: the answer, its maps, the other picture's answer and its maps.

    Raises:
        gr.Error: the picture is missing or cannot be used; the question is empty or too long for the model.
    """
    shown: list[Any] = ["", None, "", None]
    yield list(shown)
    pipe = pipes[bridge]
    pipe.model.set_bridge(bridge)
    with _errors_on_page():
        if picture is None:
            raise ValueError("Drop a picture first.")
        if not question.strip():
            raise ValueError("The question is empty.")
        if len(question) > MAX_CHARACTERS:
            raise ValueError(f"The question has {len(question)} characters; {MAX_CHARACTERS} are allowed.")
        prompts = [prompt_of(pipe, path, question, max_new_tokens) for path in (picture, other) if path is not None]
    without_lora = pipe.model.config.lora_config is not None and not use_lora
    with pipe.model.disable_adapter() if without_lora else nullcontext():
        for index, prompt in enumerate(prompts):
            for text in stream(pipe, prompt, max_new_tokens):
                shown[2 * index] = text
                yield list(shown)
        for index, prompt in enumerate(prompts):
            shown[2 * index + 1] = overlays(pipe, prompt, shown[2 * index])
            yield list(shown)


def prompt_of(pipe: Pipeline, path: str, question: str, max_new_tokens: int) -> dict[str, torch.Tensor]:
    """The model's inputs. Raises a ValueError for a picture or a question that cannot be used."""
    model, processor = pipe.model, pipe.processor
    try:
        image = processor.load_image(Path(path).read_bytes())
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{Path(path).name}: {error}") from error
    prompt = dict(pipe.preprocess(image, prompt=question).to(model.device))
    length, context = prompt["input_ids"].shape[1], model.max_text_length or processor.tokenizer.model_max_length
    if length + max_new_tokens > context:
        raise ValueError(
            f"Question and picture are {length} tokens; with {max_new_tokens} of an answer that is more than the "
            f"{context} that the model reads."
        )
    return prompt


def stream(pipe: Pipeline, prompt: Mapping[str, torch.Tensor], max_new_tokens: int) -> Iterator[str]:
    """Yield the growing answer; the last is complete. Closing the iterator stops generation."""
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = _Stop()
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    settings |= {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([stop])}

    def answer() -> dict[str, torch.Tensor]:
        try:
            return pipe.forward(prompt, generate_kwargs=settings)
        finally:
            streamer.end()

    with ThreadPoolExecutor(1) as thread:
        generating, text = thread.submit(answer), ""
        try:
            for piece in streamer:
                text += piece
                yield text.strip()
        finally:
            stop.now = True
        yield pipe.postprocess(generating.result())[0]["generated_text"]


def overlays(pipe: Pipeline, prompt: Mapping[str, torch.Tensor], answer: str) -> list[tuple[Image.Image, str]]:
    """The picture's cross-attention, mean over queries and layers; then the attribution of each word."""
    attribution = maps_of(pipe.model, pipe.processor, prompt, answer)
    named = [("queries", attribution.queries.mean((0, 1)))]
    named += [(word.text.strip(), word.patches) for word in attribution.words]
    return [(overlay(attribution.picture, patches, 336), title) for title, patches in named]


@contextmanager
def _errors_on_page() -> Iterator[None]:
    """Show a ValueError on the page, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


class _Stop(StoppingCriteria):
    """Stops a running generation."""

    now = False

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.now, device=input_ids.device)


def _picture(label: str, value: Image.Image | None = None) -> gr.Image:
    box = gr.Image(value, label=label, type="filepath", sources=["upload", "clipboard"], height=280, min_width=240)
    # gradio would open the file itself, in any format, with unclear errors
    box.preprocess = lambda file: file and file.path
    return box


def _switch(name: str, **settings: Any) -> gr.Radio:
    switch = gr.Radio([("on", True), ("off", False)], value=True, **settings)
    # gradio's API schema would name the strings "True" and "False", and then refuse them
    switch.api_info = lambda: {"type": "boolean"}
    switch.preprocess = partial(_parse_switch, name)
    return switch


def _parse_switch(name: str, value: Any) -> bool:
    """The page sends a boolean; programs may send one, or its name."""
    if str(value).lower() not in _SWITCH_VALUES:
        raise gr.Error(f"{name} is {str(value)[:60]!r}; on or off is needed, or true or false", print_exception=False)
    return _SWITCH_VALUES[str(value).lower()]


_SWITCH_VALUES = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}


def main(source: str | None = None) -> None:
    """Run the page for a model that loads with remote code.

    Args:
        source: its folder or Hub id; by default the one in this folder's README.
    """
    source = source or SpaceCard.load(Path(__file__).with_name("README.md")).data.models[0]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipe = pipeline("image-to-text", model=source, trust_remote_code=True, dtype="auto", device=device)
    build({pipe.model.active_bridge: pipe}, source).launch(**SETTINGS)


if __name__ == "__main__":
    main(*sys.argv[1:2])
