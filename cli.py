"""The command line: `lorgnette COMMAND`.

Commands that train, measure and publish pass their arguments through unchanged: to `python -m lorgnette.trainer`, which
`accelerate launch` uses too, and to `hub_upload`.
"""

import importlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from .inspection.command import inspect
from .trainer.early_checks import check_model
from .trainer.messages import one_line, quiet_libraries, set_up_logging


app = typer.Typer(
    help="Vision for a text-only language model: train, measure, publish and serve.",
    epilog="lorgnette COMMAND --help lists what each takes, with an example.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

# the command's own parser handles --help too
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# options of several commands
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL.")]
NumQueryTokens = Annotated[
    int | None, typer.Option(min=1, help="Fewer visual tokens a picture, of a model that has learned elastic_queries.")
]


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(version("lorgnette"))
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    context.obj |= {"debug": debug, "program": f"lorgnette {context.invoked_subcommand}"}


@app.command(context_settings=_PASS_THROUGH)
def train(context: typer.Context) -> None:
    """Train stage 1 or stage 2 by a recipe.

    Example: lorgnette train stage2 --config stage2 --dataset ./my-pictures --text_column text
    """
    if _names_stage(context):
        _pass_through(context, "lorgnette.trainer.__main__", context.args)


@app.command(context_settings=_PASS_THROUGH)
def init(context: typer.Context) -> None:
    """Write a recipe of stage 2 that fits a data set and this machine's memory, with the reason for each line.

    Example: lorgnette init --dataset ./my-pictures --output recipe.yaml
    """
    _pass_through(context, "lorgnette.trainer.__main__", ["init", *context.args])


@app.command(context_settings=_PASS_THROUGH)
def check(context: typer.Context) -> None:
    """Read all rows as training will, show a batch and time two steps; the exit status is 1 if a row cannot be used.

    Example: lorgnette check stage2 --config recipe.yaml
    """
    if _names_stage(context):
        _pass_through(context, "lorgnette.trainer.__main__", ["check", *context.args])


def _names_stage(context: typer.Context) -> bool:
    """Whether the first argument is a stage; False after the command's help was shown."""
    stages = ("stage1", "stage2")
    if not context.args or context.args[0] not in (*stages, "--help"):
        raise typer.BadParameter(f"name the stage first: {' or '.join(stages)}")
    if context.args[0] != "--help":
        context.obj["program"] += f" {context.args[0]}"
        return True
    typer.echo(context.command.help)
    name = f"lorgnette {context.command.name}"
    typer.echo(f"\n{name} stage1 --help and {name} stage2 --help list the options.")
    return False


@app.command(context_settings=_PASS_THROUGH)
def cache(context: typer.Context) -> None:
    """Write the features of the frozen ViT to disk; both stages read them in place of pictures.

    Example: lorgnette cache --config cache --dataset ./my-pictures --output_dir out/cache
    """
    _pass_through(context, "lorgnette.trainer.__main__", ["cache", *context.args])


@app.command(context_settings=_PASS_THROUGH)
def evaluate(context: typer.Context) -> None:
    """Generate texts for a data set with a saved model, and measure them.

    Example: lorgnette evaluate --model out/stage2 --dataset ./my-pictures --split test --metrics cider bleu
    """
    _pass_through(context, "lorgnette.trainer.__main__", ["evaluate", *context.args])


app.command()(inspect)


@app.command(context_settings=_PASS_THROUGH)
def push(context: typer.Context) -> None:
    """Check a trained model, write its card and publish it on the Hub; log in once with `hf auth login`.

    Example: lorgnette push out/stage2 --repo-id me/my-eyes --metrics out/evaluate/metrics.json
    """
    _pass_through(context, "lorgnette.hub_upload", context.args, "run")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def export(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="OUT", help="A saved model, a run's folder or a checkpoint.")],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where the export goes.")],
) -> None:
    """Fill a new folder with what `push` would upload; a process without lorgnette loads and checks it.

    After the two folders come options of `lorgnette push`: --save-format; --repo-id and --license for the card …

    Example: lorgnette export out/stage2 out/export --save-format merged
    """
    arguments = [source, "--dry-run", "--export-dir", folder, *context.args]
    _pass_through(context, "lorgnette.hub_upload", arguments, "run")


def _pass_through(context: typer.Context, module: str, arguments: list[str], function: str = "main") -> None:
    if {"--help", "--help-all"} & set(arguments):
        typer.echo(f"{context.command.help}\n")
    name = context.info_name
    prog = "lorgnette" if arguments[:1] == [name] else f"lorgnette {name}"  # a trainer's command adds its name
    getattr(importlib.import_module(module), function)(arguments, prog=prog)


@app.command()
def caption(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")],
    pictures: Annotated[list[str], typer.Argument(metavar="PICTURE…", help="Files or URLs.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt; by default the model's own query.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="At most so many tokens an answer.")] = None,
    num_query_tokens: NumQueryTokens = None,
    revision: Revision = None,
) -> None:
    """Caption pictures: one line each, with the picture's name, a tab and the text.

    A picture that cannot be read is an error on stderr; the others are captioned, and the exit status is 2.

    Example: lorgnette caption out/stage2 cat.jpg https://example.org/dog.png --prompt "What animal is this?"
    """
    check_model("MODEL", model)
    from tqdm.auto import tqdm

    from .assembly.picture_sizes import check_image_processor
    from .assembly.sources import from_pretrained_arguments
    from .modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
    from .processing.pipeline_lorgnette import LorgnetteImageToTextPipeline
    from .processing.processing_lorgnette import LorgnetteProcessor

    set_up_logging(True)
    source, keywords = from_pretrained_arguments(model, revision, num_query_tokens=num_query_tokens)
    processor = LorgnetteProcessor.from_pretrained(source, **keywords)
    loaded = LorgnetteForConditionalGeneration.from_pretrained(source, dtype="auto", **keywords).eval()
    loaded.check_processor(processor)
    check_image_processor(processor.image_processor, processor.max_image_pixels)
    captioner = LorgnetteImageToTextPipeline(model=loaded, processor=processor)
    options = {"prompt": prompt, "max_new_tokens": max_new_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    failed = 0
    for picture in tqdm(pictures, unit="picture", disable=None):
        captioner.call_count = 0  # a Pipeline warns of many calls on a GPU
        try:
            answer = captioner(processor.load_image(picture), **options)
        except (OSError, TypeError, ValueError) as error:
            failed += 1
            message = str(error) if picture in str(error) else f"{picture}: {error}"
            tqdm.write(f"lorgnette caption: error: {message}", file=sys.stderr)
            continue
        text = " ".join(answer[0]["generated_text"].split())
        tqdm.write(f"{picture}\t{text}", file=sys.stdout)
    if failed:
        typer.echo(f"lorgnette caption: {failed} of {len(pictures)} pictures failed", err=True)
        raise typer.Exit(2)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")],
    bridge: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="Another model over the same ViT and LM; repeatable.")
    ] = None,
    name: Annotated[str, typer.Option(help="What callers name MODEL's own bridge.")] = "default",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key that callers have to send.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Download pictures from this host only; repeatable.")
    ] = None,
    internal_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="A host of the private network, as in URLs; repeatable.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request; then it fails.")] = 25.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests in one batch of the model.")] = 8,
    capacity: Annotated[int, typer.Option(min=1, help="Requests in progress; the next gets a 503.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Upper limit on the new tokens of an answer.")] = 128,
    num_query_tokens: NumQueryTokens = None,
    revision: Revision = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:1 …; by default a GPU where there is one.")] = None,
) -> None:
    """Serve the model over HTTP: /v1/vision, and OpenAI's chat completions at /v1/chat/completions.

    Example: lorgnette serve me/my-eyes --name q-former-v2 --bridge charts=out/charts --api-key-env WORKER_KEY
    """
    bridges = _bridges(bridge)
    key = None if api_key_env is None else os.environ.get(api_key_env)
    if api_key_env is not None and not key:
        raise typer.BadParameter(f"--api-key-env: the environment has no {api_key_env}, or an empty one")
    if key is None and host not in _LOOPBACK:
        typer.echo(f"anybody who reaches {host}:{port} can send requests: --api-key-env requires a key", err=True)
    _check_free(host, port)
    check_model("MODEL", model)
    with _extra("serve"):
        from .serving.allowed_hosts import AllowedHosts
        from .serving.engine import InferenceEngine, Limits
        from .serving.worker import run

    set_up_logging(True)
    limits = Limits(timeout=timeout, max_batch=max_batch, capacity=capacity, max_new_tokens=max_new_tokens)
    hosts = AllowedHosts(allow_host, internal_host or ())
    run(
        InferenceEngine.load(
            model,
            bridges,
            name=name,
            revision=revision,
            num_query_tokens=num_query_tokens,
            device=device,
            limits=limits,
            hosts=hosts,
        ),
        host,
        port,
        key,
    )


@app.command("app")
def page(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")],
    bridge: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="Another model over the same ViT and LM; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens an answer.")] = 128,
    num_query_tokens: NumQueryTokens = None,
    revision: Revision = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:1 …; by default a GPU where there is one.")] = None,
) -> None:
    """Serve a demo page: answers, attention maps of the picture, and the answer for a second picture.

    Example: lorgnette app out/stage2 --bridge charts=out/charts
    """
    bridges = _bridges(bridge)
    if host not in _LOOPBACK:
        typer.echo(f"anybody who reaches {host}:{port} can send requests", err=True)
    _check_free(host, port)
    check_model("MODEL", model)
    with _extra("app"):
        from .serving.app import SETTINGS, build
    from .processing.pipeline_lorgnette import LorgnetteImageToTextPipeline
    from .serving.loading import load

    set_up_logging(True)
    loaded, processors = load(
        model, bridges, name="default", revision=revision, num_query_tokens=num_query_tokens, device=device
    )
    pipes = {}
    for name, processor in processors.items():
        loaded.set_bridge(name)  # a pipeline copies the generation config of the active bridge
        pipes[name] = LorgnetteImageToTextPipeline(model=loaded, processor=processor, device=loaded.device)
    build(pipes, model, max_new_tokens).launch(server_name=host, server_port=port, **SETTINGS)


def _bridges(pairs: list[str] | None) -> dict[str, str]:
    """`NAME=MODEL` of each `--bridge`."""
    bridges: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, source = pair.partition("=")
        if not (name and equals and source):
            raise typer.BadParameter(f"--bridge {pair}: NAME=MODEL is needed")
        if name in bridges:
            raise typer.BadParameter(f"--bridge {name} is given twice")
        bridges[name] = source
    return bridges


def _check_free(host: str, port: int) -> None:
    """Raise an OSError if the address is in use: before the model is loaded, not after."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise typer.BadParameter(f"--host {host}: {error.strerror}") from error
    socket.create_server(address, family=family).close()


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Within the block, the error about a missing package names the extra that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'lorgnette[{name}]'") from error


def main() -> None:
    """Run the command line.

    Exit status: 2 for a usage error or an exception, 1 if `inspect` finds a red check or `check` a bad row.
    """
    settings: dict[str, Any] = {"debug": False, "program": "lorgnette"}
    quiet_libraries()
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False, obj=settings)
    except TyperException as error:
        typer.echo(f"{settings['program']}: error: {error.format_message()} (--help lists the options)", err=True)
        status = error.exit_code
    except Exception as error:
        if settings["debug"]:
            raise
        typer.echo(one_line(error, settings["program"], "lorgnette"), err=True)
        status = 2
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
