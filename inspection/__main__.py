"""`python -m lorgnette.inspection MODEL`: see [`~lorgnette.inspection.command.inspect`]."""

import sys

import typer

from .command import inspect


def main(argv: list[str]) -> int:
    """Inspect as the command line says; the exit status is 1 where a check is red, 2 for a mistake, which is a line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(inspect)
    try:
        app(argv, prog_name="python -m lorgnette.inspection")
    except SystemExit as done:  # typer's way to return
        return int(done.code or 0)
    except (OSError, ValueError, TypeError) as error:
        typer.echo(f"error: {error}", err=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
