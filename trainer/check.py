"""Check the data of a recipe before training: read all rows as training will, show a batch, and time two steps."""

from argparse import ArgumentParser

from . import stage1, stage2


STAGES = {"stage1": stage1, "stage2": stage2}


def main(argv: list[str], prog: str = "python -m lorgnette.trainer check") -> None:
    """`check STAGE …` is `STAGE … --dry_run true`; the exit status is 1 if training would stop at a row."""
    parser = ArgumentParser(prog=prog, description=__doc__, add_help=False)
    parser.add_argument("stage", choices=STAGES, help="the options that follow are those of the stage")
    if argv[:1] in ([], ["--help"], ["-h"]):
        parser.print_help()
        parser.exit(0 if argv else 2)
    stage = parser.parse_args(argv[:1]).stage
    STAGES[stage].main([*argv[1:], "--dry_run", "true"], prog=f"{prog} {stage}")
