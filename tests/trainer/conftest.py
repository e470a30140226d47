"""What the tests of data set formats share."""

import datasets
import pytest
from tiny_formats import write_pictures


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path):
    """Four pictures in a folder of their own."""
    return write_pictures(tmp_path / "data")
