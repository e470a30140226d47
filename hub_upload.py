"""Publish a trained model: `python hub_upload.py OUT --repo-id me/name`, or [`upload`] from Python.

It exports OUT into a clean folder, writes its card, refuses files that should not be published, checks the folder in a
process without lorgnette, pushes in one commit and verifies the repository. `--dry-run` skips the last two. It uploads
nothing, but downloads the backbones' licences, unless `--license` is given, and the backbones of a thin export. Log in
once with `hf auth login`; huggingface_hub keeps the token, and this program neither prints nor saves it.
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
from lorgnette.publishing.export import check, load, new_directory
from lorgnette.publishing.guards import check_card, check_folder
from lorgnette.publishing.push import check_name, push, readable_hub_errors
from lorgnette.publishing.space import write_space
from lorgnette.trainer.messages import set_up_logging


logger = logging.getLogger("lorgnette.hub_upload")


def prepare(
    source: str | Path,
    repo_id: str | None,
    folder: str | Path,
    *,
    save_format: str | None = None,
    license: str | None = None,
    metrics: tuple[str | Path, ...] = (),
    picture: str | Path | None = None,
    needs_license: bool = True,
) -> list[str]:
    """Export a model with its card, and check that the folder works and can be published.

    The folder appears when all is done; an error, for example a full disk, leaves nothing behind.

    Args:
        source: a saved model of either stage, a run's folder or a checkpoint.
        repo_id: `owner/name`, for the card's examples; None for a folder that stays here: then the card has the
            folder's name.
        folder: the target; created if it does not exist.
        save_format: `"thin"`, `"full"` or `"merged"`, as `save_pretrained` takes it; None leaves it to the model.
        license: one of the Hub's identifiers; by default the one that the backbones' cards agree on.
        metrics: `metrics.json` files of `lorgnette.trainer evaluate` or `retrieval`, of this model.
        picture: the file for the check; a drawn one by default.
        needs_license: False for a folder that stays here: a licence that is not known is a warning.

    Returns:
        the relative paths of the folder's files.

    Raises:
        FileNotFoundError: the model, processor, metrics or picture does not exist.
        FileExistsError: `folder` is not empty.
        ValueError: a name that the Hub forbids, a model of another kind, no such save format, no licence, metrics of
            another model, a file that must not be published.
        RuntimeError: a process without lorgnette gets other outputs from the folder than the model here, or none.
    """
    if repo_id is not None:
        check_name(repo_id)
    else:
        repo_id = Path(folder).resolve().name
        logger.warning("No --repo-id is given: the card has the folder's name, %s, as its title", repo_id)
    with new_directory(folder) as unfinished:
        model, processor = load(source)
        save_format = resolve_save_format(model, save_format)
        # find errors before writing gigabytes
        card = make_card(
            model,
            processor,
            repo_id,
            source,
            license=license,
            needs_license=needs_license,
            metrics=metrics,
            save_format=save_format,
        )
        if picture is not None:
            processor.load_image(str(picture))
        card.save(unfinished / "README.md")
        if needs_license:
            check_card(unfinished / "README.md")
        model.save_pretrained(unfinished, save_format=save_format)
        processor.save_pretrained(unfinished)
        if not processor.is_stage1:
            write_endpoint(unfinished)
            write_space(unfinished, repo_id)
        files = check_folder(unfinished, private_paths=(source, folder))
        if save_format == "thin" != model.config.saved_form:
            type(model).from_pretrained(unfinished)  # downloads the backbones: the process without lorgnette cannot
        logger.info(
            "%s: %d files in the %s format; a process without lorgnette checks them now",
            source,
            len(files),
            save_format,
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
        LocalTokenNotFoundError: there is no login.
    """
    check_name(repo_id)
    with readable_hub_errors():
        HfApi().whoami()  # before minutes of work
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "export")
        prepare(source, repo_id, folder, save_format=save_format, license=license, metrics=metrics, picture=picture)
        return push(folder, repo_id, private=private, revision=revision, replace=replace)


def main(argv: list[str]) -> None:
    """Like [`run`], but an error becomes one message and status 2."""
    try:
        run(argv)
    except (OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"hub_upload.py: error: {error}\n")
        sys.exit(2)


def run(argv: list[str], prog: str = "hub_upload.py") -> None:
    """Run the command line. Raises what [`prepare`] and [`upload`] do.

    Args:
        prog: the program's name, for help and errors.
    """
    parser = _Parser(prog=prog, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="OUT", help="a saved lorgnette model, a Trainer's output_dir or a checkpoint")
    parser.add_argument(
        "--repo-id", metavar="OWNER/NAME", help="the repository; created if it does not exist. An export needs none"
    )
    parser.add_argument("--private", action="store_true", help="create it as private")
    parser.add_argument(
        "--save-format",
        "--form",
        choices=SAVE_FORMATS,
        help="as save_pretrained takes it; by default the model decides",
    )
    parser.add_argument("--revision", help="a branch instead of main; created if it does not exist")
    parser.add_argument("--license", help="the Hub's identifier; by default what the backbones' cards agree on")
    parser.add_argument(
        "--metrics", nargs="+", default=(), metavar="metrics.json", help="measured results for the card"
    )
    parser.add_argument("--picture", help="picture for the check of the export; a drawn one by default")
    parser.add_argument(
        "--replace", action="store_true", help="delete the repository's other files, even another model's"
    )
    parser.add_argument("--dry-run", action="store_true", help="export, check and show the card; upload nothing")
    parser.add_argument("--export-dir", help="with --dry-run: keep the export in this folder")
    args = parser.parse_args(argv)
    if args.export_dir and not args.dry_run:
        parser.error("--export-dir goes with --dry-run")
    if args.repo_id is None and not args.export_dir:
        parser.error("the following arguments are required: --repo-id")
    set_up_logging(True)
    shared = {name: getattr(args, name) for name in ("save_format", "license", "picture")} | {
        "metrics": tuple(args.metrics)
    }
    if args.dry_run:
        with nullcontext() if args.export_dir else tempfile.TemporaryDirectory() as scratch:
            folder = Path(args.export_dir or Path(scratch, "export"))
            files = prepare(args.source, args.repo_id, folder, needs_license=not args.export_dir, **shared)
            sizes = {name: (folder / name).stat().st_size for name in files}
            card = (folder / "README.md").read_text(encoding="utf-8")
        if args.export_dir:
            size = f"{len(sizes)} files, {sum(sizes.values()):,} bytes"
            logger.info("%s holds the export: %s; its card is README.md", folder, size)
        else:
            lines = "\n".join(f"{size:>15,}  {name}" for name, size in sizes.items())
            logger.info("%s would hold, in bytes:\n%s\n\n%s", args.repo_id, lines, card)
        return
    options = {name: getattr(args, name) for name in ("private", "revision", "replace")}
    commit = upload(args.source, args.repo_id, **shared, **options)
    logger.info("%s", commit.commit_url)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print the error without the usage, which is longer."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all options\n")


if __name__ == "__main__":
    main(sys.argv[1:])
