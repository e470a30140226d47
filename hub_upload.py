"""Publish a trained model: `python hub_upload.py OUT --repo-id me/name`, or [`upload`] from Python.

It exports OUT into a clean folder, tries that as a stranger would, writes its card, refuses what should not be
published, pushes in one commit and reads the repository back. `--dry-run` does all but the last two. It sends nothing,
but asks the Hub for the backbones' licences, unless one is given, and for the backbones themselves of a thin export.
Log in once with `hf auth login`: the token is huggingface_hub's business, and is neither printed nor saved here.
"""

import logging
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from huggingface_hub import CommitInfo, HfApi

from lorgnette.assembly.endpoint import write_endpoint
from lorgnette.configuration.configuration_lorgnette import SAVE_FORMATS
from lorgnette.modeling.modeling_saving import resolve_save_format
from lorgnette.publishing.card import make_card
from lorgnette.publishing.export import appearing_whole, check, load
from lorgnette.publishing.guards import check_card, check_folder
from lorgnette.publishing.push import check_name, push, told_plainly
from lorgnette.publishing.space import write_space
from lorgnette.trainer.messages import set_up_logging


logger = logging.getLogger("lorgnette.hub_upload")


def prepare(
    source: str | Path,
    repo_id: str,
    folder: str | Path,
    *,
    save_format: str | None = None,
    license: str | None = None,
    metrics: tuple[str | Path, ...] = (),
    picture: str | Path | None = None,
) -> list[str]:
    """Fill an empty folder with all that a repository is to hold, and see to it that it works and may be published.

    The folder appears when all is done; an error half way, a full disk for instance, leaves nothing of it.

    Args:
        source: a saved model of either stage, or what Trainer left: a run's folder or a checkpoint.
        repo_id: `owner/name`, which the card's examples name.
        folder: where it goes; made where it is not there.
        save_format: `"thin"`, `"full"` or `"merged"`, as `save_pretrained` takes it; None leaves it to the model.
        license: one of the Hub's identifiers; by default the one that the backbones' cards agree on.
        metrics: `metrics.json` files of `lorgnette.trainer evaluate` or `retrieval`, of this model.
        picture: the file that the model is tried on; a drawn one by default.

    Returns:
        the relative paths of the folder's files.

    Raises:
        FileNotFoundError: no model, no processor, no such metrics or picture.
        FileExistsError: `folder` is not empty.
        ValueError: a name that the Hub forbids, a model of another kind, no such save format, no licence, metrics of
            another model, a file that must not be published.
        RuntimeError: a stranger gets something else from the folder than the model gives here, or nothing.
    """
    check_name(repo_id)
    with appearing_whole(folder) as unfinished:
        model, processor = load(source)
        save_format = resolve_save_format(model, save_format)
        # what may be missing or wrong is found before gigabytes are written
        card = make_card(model, processor, repo_id, source, license=license, metrics=metrics, save_format=save_format)
        if picture is not None:
            processor.load_image(str(picture))
        card.save(unfinished / "README.md")
        check_card(unfinished / "README.md")
        model.save_pretrained(unfinished, save_format=save_format)
        processor.save_pretrained(unfinished)
        if not processor.is_stage1:
            write_endpoint(unfinished)
            write_space(unfinished, repo_id)
        files = check_folder(unfinished, private_paths=(source, folder))
        if save_format == "thin" != model.config.saved_form:
            type(model).from_pretrained(unfinished)  # brings the backbones into the cache: the stranger asks no Hub
        logger.info(
            "%s: %d files in the %s format; a process without lorgnette tries them now", source, len(files), save_format
        )
        check(model, processor, unfinished, picture, exact=save_format != "merged")
    return files


def upload(
    source: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    save_format: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    metrics: tuple[str | Path, ...] = (),
    picture: str | Path | None = None,
    replace: bool = False,
) -> CommitInfo:
    """[`prepare`] a folder and [`~lorgnette.publishing.push.push`] it; see there for arguments and further errors.

    Raises:
        LocalTokenNotFoundError: nobody is logged in.
    """
    check_name(repo_id)
    with told_plainly():
        HfApi().whoami()  # before minutes of work
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "export")
        prepare(source, repo_id, folder, save_format=save_format, license=license, metrics=metrics, picture=picture)
        return push(folder, repo_id, private=private, revision=revision, replace=replace)


def main(argv: list[str]) -> None:
    """As [`run`], but an error is one message and status 2."""
    try:
        run(argv)
    except (OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"hub_upload.py: error: {error}\n")
        sys.exit(2)


def run(argv: list[str], prog: str = "hub_upload.py") -> None:
    """Do as the command line says. Raises what [`prepare`] and [`upload`] do.

    Args:
        prog: what was typed before `argv`, for help and errors.
    """
    parser = _Parser(prog=prog, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="OUT", help="a saved lorgnette model, a Trainer's output_dir or a checkpoint")
    parser.add_argument(
        "--repo-id", required=True, metavar="OWNER/NAME", help="the repository; made where it is not there"
    )
    parser.add_argument("--private", action="store_true", help="make it private, if it is made")
    parser.add_argument(
        "--save-format",
        "--form",
        choices=SAVE_FORMATS,
        help="as save_pretrained takes it; by default the model decides",
    )
    parser.add_argument("--revision", help="a branch in place of main; made where it is not there")
    parser.add_argument("--license", help="the Hub's identifier; by default what the backbones' cards agree on")
    parser.add_argument(
        "--metrics", nargs="+", default=(), metavar="metrics.json", help="measured results for the card"
    )
    parser.add_argument("--picture", help="what the export is tried on; a drawn picture by default")
    parser.add_argument(
        "--replace", action="store_true", help="even if the repository holds something else, which goes"
    )
    parser.add_argument("--dry-run", action="store_true", help="export, check and show the card; nothing is sent")
    parser.add_argument("--export-dir", help="with --dry-run: where the export stays")
    args = parser.parse_args(argv)
    if args.export_dir and not args.dry_run:
        parser.error("--export-dir goes with --dry-run")
    set_up_logging(True)
    shared = {name: getattr(args, name) for name in ("save_format", "license", "picture")} | {
        "metrics": tuple(args.metrics)
    }
    if args.dry_run:
        with nullcontext() if args.export_dir else tempfile.TemporaryDirectory() as scratch:
            folder = Path(args.export_dir or Path(scratch, "export"))
            files = prepare(args.source, args.repo_id, folder, **shared)
            sizes = {name: (folder / name).stat().st_size for name in files}
            card = (folder / "README.md").read_text(encoding="utf-8")
        if args.export_dir:
            told = f"{len(sizes)} files, {sum(sizes.values()):,} bytes"
            logger.info("%s holds what %s would hold: %s; its card is README.md", folder, args.repo_id, told)
        else:
            lines = "\n".join(f"{size:>15,}  {name}" for name, size in sizes.items())
            logger.info("%s would hold, in bytes:\n%s\n\n%s", args.repo_id, lines, card)
        return
    options = {name: getattr(args, name) for name in ("private", "revision", "replace")}
    commit = upload(args.source, args.repo_id, **shared, **options)
    logger.info("%s", commit.commit_url)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """The error alone, without the usage, which is longer."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all options\n")


if __name__ == "__main__":
    main(sys.argv[1:])
