"""`python -m lorgnette.trainer COMMAND --config RECIPE`; the same behind torchrun or `accelerate launch -m`."""

import importlib
import sys
from argparse import ArgumentParser

from .early_checks import check_command_line
from .messages import quiet_libraries


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


def main(argv: list[str], prog: str = "python -m lorgnette.trainer") -> None:
    """Run a command.

    Args:
        prog: the program's name without the command, for help and errors.
    """
    listing = "; ".join(f"{name}: {purpose}" for name, purpose in COMMANDS.items())
    parser = ArgumentParser(prog=prog, epilog="COMMAND --help lists its options.")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=listing)
    command = parser.parse_args(argv[:1]).command
    prog = f"{prog} {command}"
    try:
        check_command_line(argv[1:])
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        sys.exit(2)
    quiet_libraries()
    importlib.import_module(f"lorgnette.trainer.{command}").main(argv[1:], prog=prog)
    importlib.import_module("lorgnette.trainer.process").end_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
