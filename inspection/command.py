"""The command line: inspect a saved model."""

from pathlib import Path
from typing import Annotated

import typer

from ..trainer.early_checks import check_model


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A saved model of stage 2, or a checkpoint: a folder or a Hub id.")
    ],
    image: Annotated[
        list[str] | None, typer.Option(help="A picture to explain: a file or URL. May be repeated.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Pictures and texts, in any format that training takes.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the dataset; by default test, or the rows that training held out.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column with the pictures.")] = "image",
    text_column: Annotated[str, typer.Option(help="Column with the texts.")] = "text",
    query_column: Annotated[str | None, typer.Option(help="Column with the query of each row.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Column with chats, in source of the two.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows of the dataset to use.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that go through the model at once.")] = 8,
    vision: Annotated[str | None, typer.Option(help="Source of the ViT; by default the config's.")] = None,
    text: Annotated[str | None, typer.Option(help="Source of the LM; by default the config's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps …; by default an accelerator, if any.")] = None,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, writable=True, help="Write the report there: one file, pictures too.")
    ] = None,
    json: Annotated[Path | None, typer.Option(dir_okay=False, writable=True, help="Write all figures there.")] = None,
) -> None:
    """Inspect a model: its parts, checks of its weights and labels, and attention maps.

    Example: lorgnette inspect out/stage2 --dataset ./my-pictures --image cat.jpg --html report.html

    The exit status is 1 if a check is red.
    """
    check_model("MODEL", model)
    from itertools import islice

    import torch

    from ..assembly.sources import from_pretrained_arguments
    from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
    from ..processing.processing_lorgnette import LorgnetteProcessor
    from ..trainer.arguments import RowArguments
    from ..trainer.collator import LorgnetteCollator
    from ..trainer.data import load_rows_of_model
    from ..trainer.messages import set_up_logging
    from .check_weights import Original
    from .inspector import inspect_model
    from .printout import print_inspection
    from .report import write_html, write_json

    set_up_logging(True)
    for path in filter(None, (html, json)):
        path.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than at the end
    source, keywords = from_pretrained_arguments(model, revision)
    processor = LorgnetteProcessor.from_pretrained(source, **keywords)
    loaded = LorgnetteForConditionalGeneration.from_pretrained(source, **keywords)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    loaded.to(device or accelerator or "cpu")
    data_rows = []
    if dataset is not None:
        columns = {"image_column": image_column, "text_column": text_column}
        columns |= {"query_column": query_column, "messages_column": messages_column}
        found, _ = load_rows_of_model(RowArguments(dataset=dataset, **columns), split, model)
        data_rows = list(islice(found, rows))
    inspection = inspect_model(
        loaded,
        processor,
        data_rows,
        collator=LorgnetteCollator(
            processor, image_column=image_column, text_column=text_column, query_column=query_column
        ),
        pictures=[{image_column: picture} for picture in image] if image else None,
        original=Original.from_sources(loaded, processor, vision, text),
        name=model,
        batch_size=batch_size,
    )
    print_inspection(inspection)
    for path, write in ((html, write_html), (json, write_json)):
        if path is not None:
            write(inspection, path)
            typer.echo(f"wrote {path}")
    if inspection.failed:
        raise typer.Exit(1)
