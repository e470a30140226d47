"""`python -m lorgnette.trainer COMMAND --config RECIPE`; the same behind torchrun or `accelerate launch -m`."""

import importlib
import signal
import sys
from argparse import ArgumentParser
from itertools import takewhile

from .early_checks import check_command_line
from .messages import one_line, quiet_libraries


PROG = "python -m lorgnette.trainer"
# command -> description; the module of that name has `main(argv)`
COMMANDS = {
    "init": "write a recipe of stage 2 that fits a data set and this machine",
    "check": "read all rows as training will, and time two steps; `stage1` or `stage2` comes next",
    "stage1": "teach the Q-Former to see what words can say: contrast, matching, generation",
    "stage2": "train Q-Former, projector and LoRA to put pictures into words",
    "retrieval": "measure how a stage-1 model finds texts for pictures, and pictures for texts",
    "evaluate": "generate texts for a data set with a saved model, and measure them",
    "cache": "write what the frozen ViT sees to disk, for both stages to read in place of pictures",
}
# command -> what Ctrl-C leaves, and how to go on; training's own loop says more
_AGAIN = "the same command starts again"
_OF_A_RUN = f"checkpoints are kept, and --resume_from_checkpoint true continues from the newest; without one {_AGAIN}"
INTERRUPTED = {
    "init": f"no recipe was written; {_AGAIN}",
    "check": f"nothing was trained; {_AGAIN}",
    "stage1": _OF_A_RUN,
    "stage2": _OF_A_RUN,
    "retrieval": f"no figures were written; {_AGAIN}",
    "evaluate": f"no answers and no figures were written; {_AGAIN}",
    "cache": "complete shards are kept, and the same command continues after them",
}


def run(argv: list[str]) -> None:
    """Run a command, and print an error as one line; with `--debug` before the command it is raised."""
    debug = argv[:1] == ["--debug"]
    argv = argv[1:] if debug else argv
    try:
        main(argv)
    except Exception as error:
        if debug:
            raise
        command = list(takewhile(lambda argument: not argument.startswith("-"), argv))
        sys.stderr.write(f"{one_line(error, ' '.join([PROG, *command]), PROG)}\n")
        sys.exit(2)


def main(argv: list[str], prog: str = PROG) -> None:
    """Run a command.

    Args:
        prog: the program's name without the command, for help and errors.

    Raises:
        SystemExit: Ctrl-C, after a line on what is kept; or the command's own status.
    """
    listing = "; ".join(f"{name}: {purpose}" for name, purpose in COMMANDS.items())
    debug = " --debug before COMMAND shows where an error comes from." if prog == PROG else ""
    parser = ArgumentParser(prog=prog, epilog=f"COMMAND --help lists its options.{debug}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=listing)
    command = parser.parse_args(argv[:1]).command
    prog = f"{prog} {command}"
    try:
        check_command_line(argv[1:])
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        sys.exit(2)
    quiet_libraries()
    try:
        importlib.import_module(f"lorgnette.trainer.{command}").main(argv[1:], prog=prog)
    except KeyboardInterrupt:
        end_of_bar = "\n" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{end_of_bar}{prog}: interrupted: {INTERRUPTED[command]}\n")
        sys.exit(128 + signal.SIGINT)
    importlib.import_module("lorgnette.trainer.process").end_process_group()


if __name__ == "__main__":
    run(sys.argv[1:])
