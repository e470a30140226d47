"""Where this package's own log messages go, when one of its commands is running."""

import logging


def set_up_logging(speaks: bool) -> None:
    """Send the messages of `lorgnette` to stderr: all of those of the process that speaks, warnings of the others."""
    ours = logging.getLogger("lorgnette")
    ours.setLevel(logging.INFO if speaks else logging.WARNING)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
        ours.addHandler(handler)
