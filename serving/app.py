"""A page to play with a model: drop a picture, ask, and see the answer, where it was read from, and another picture's.

`lorgnette app` shows it. It also goes along with every upload, in `space/`, as the Space that the repository asks for:
`python app.py` there runs it where lorgnette is not installed, on the model that the README beside it names.
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

from ..inspection.drawing import drawn, overlay
from ..inspection.maps import maps_of


MAX_CHARACTERS = 50_000  # counting the tokens of more would take longer than answering
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none is fetched
SETTINGS = {  # for `launch`
    "theme": gr.themes.Default(**FONTS),
    "footer_links": ["api", "gradio", "settings"],
    "max_file_size": "20mb",
    "share": False,
    "ssr_mode": False,
    "show_error": True,
}


def build(pipes: Mapping[str, Pipeline], name: str, max_new_tokens: int = 128) -> gr.Blocks:
    """The page.

    Args:
        pipes: an `image-to-text` pipeline for each bridge of one model, by the bridge's name. The model is in eval mode
            and the page's own from now on.
        name: what the model is called.
        max_new_tokens: of an answer.
    """
    bridges, (first, *_) = list(pipes), pipes.values()
    has_lora = False
    for bridge in reversed(bridges):  # the first is in use in the end
        first.model.set_bridge(bridge)
        has_lora = has_lora or first.model.config.lora_config is not None
    with gr.Blocks(title=f"lorgnette: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"## {name}\nDrop a picture and ask. The same is asked of another one: where they show different things, a "
            "model that looks gives different answers. Bright is where it looked: the cross-attention of all queries, "
            "then what each word of the answer was read from."
        )
        with gr.Row():
            pictures = [_picture("Picture"), _picture("Another picture", drawn())]
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
        shown = {"show_progress": "minimal", "show_progress_on": outputs[0]}  # or all four would say "Error" of one
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
    """Ask one question of two pictures, one after the other.

    Args:
        picture, other: files; without the other only one is asked about.

    Yields:
        what there is so far of the answer, its maps, the other's answer and its maps.

    Raises:
        gr.Error: no picture, one that cannot be used, no question, or a longer one than the model reads.
    """
    shown: list[Any] = ["", None, "", None]
    yield list(shown)
    pipe = pipes[bridge]
    pipe.model.set_bridge(bridge)
    with _told():
        if picture is None:
            raise ValueError("Drop a picture first.")
        if not question.strip():
            raise ValueError("There are no words in the question.")
        if len(question) > MAX_CHARACTERS:
            raise ValueError(f"The question has {len(question)} characters; {MAX_CHARACTERS} are allowed.")
        prompts = [prompt_of(pipe, path, question, max_new_tokens) for path in (picture, other) if path is not None]
    without_lora = pipe.model.config.lora_config is not None and not use_lora
    with pipe.model.disable_adapter() if without_lora else nullcontext():
        for place, prompt in enumerate(prompts):
            for said in stream(pipe, prompt, max_new_tokens):
                shown[2 * place] = said
                yield list(shown)
        for place, prompt in enumerate(prompts):
            shown[2 * place + 1] = overlays(pipe, prompt, shown[2 * place])
            yield list(shown)


def prompt_of(pipe: Pipeline, path: str, question: str, max_new_tokens: int) -> dict[str, torch.Tensor]:
    """What the model is given. Raises a ValueError for a picture or a question that cannot be used."""
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
    """The answer so far, again and again; the last is the whole. Who stops listening stops the model."""
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
        answering, said = thread.submit(answer), ""
        try:
            for piece in streamer:
                said += piece
                yield said.strip()
        finally:
            stop.now = True
        yield pipe.postprocess(answering.result())[0]["generated_text"]


def overlays(pipe: Pipeline, prompt: Mapping[str, torch.Tensor], answer: str) -> list[tuple[Image.Image, str]]:
    """Cross-attention over the picture, the mean over queries and layers; then where each word was read from."""
    look = maps_of(pipe.model, pipe.processor, prompt, answer)
    named = [("queries", look.queries.mean((0, 1)))]
    named += [(word.text.strip(), word.patches) for word in look.words]
    return [(overlay(look.picture, patches, 336), title) for title, patches in named]


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong with a question is shown on the page, and no trace anywhere."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


class _Stop(StoppingCriteria):
    """Ends an answer from outside."""

    now = False

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.now, device=input_ids.device)


def _picture(label: str, value: Image.Image | None = None) -> gr.Image:
    box = gr.Image(value, label=label, type="filepath", sources=["upload", "clipboard"], height=280, min_width=240)
    # gradio would open the file itself, in any format, with errors that do not say what is wrong
    box.preprocess = lambda file: file and file.path
    return box


def _switch(name: str, **settings: Any) -> gr.Radio:
    switch = gr.Radio([("on", True), ("off", False)], value=True, **settings)
    # gradio would offer the API the strings "True" and "False", and refuse them
    switch.api_info = lambda: {"type": "boolean"}
    switch.preprocess = partial(_switched, name)
    return switch


def _switched(name: str, value: Any) -> bool:
    """The page sends a boolean, and so may programs, or a word for it."""
    if str(value).lower() not in _SWITCHED:
        raise gr.Error(f"{name} is {str(value)[:60]!r}; on or off is needed, or true or false", print_exception=False)
    return _SWITCHED[str(value).lower()]


_SWITCHED = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}


def main(source: str | None = None) -> None:
    """Show a model whose code is its own.

    Args:
        source: its folder or Hub id; by default what the README beside this file names.
    """
    source = source or SpaceCard.load(Path(__file__).with_name("README.md")).data.models[0]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipe = pipeline("image-to-text", model=source, trust_remote_code=True, dtype="auto", device=device)
    build({pipe.model.active_bridge: pipe}, source).launch(**SETTINGS)


if __name__ == "__main__":
    main(*sys.argv[1:2])
