"""No test reaches a hub, waits for an answer about remote code, or writes outside its own folders."""

import gc
import os

import pytest


os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they save
os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")  # figures that no CPU's instructions decide
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage() -> None:
    """Trainer collects garbage with every run; what the imports left need not be looked through each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def hub():
    """A Hub of the tests' own, on the loopback device."""
    import hub_server

    with hub_server.running() as server:
        yield server


@pytest.fixture(scope="module")
def server():
    """The address of a web server with a picture, and with everything that may be wrong with one."""
    import picture_server

    with picture_server.running() as address:
        yield address


@pytest.fixture
def visitors():
    """A port on which somebody listens, as an FTP server would, and who has come there."""
    import picture_server

    with picture_server.listening() as heard:
        yield heard
