"""A quick part of `make conformance`: transformers' common tests on our models, out of its source distribution."""

import importlib
import sys
import unittest
from pathlib import Path

import pytest

from conformance.source import common_tests


CLASSES = ["LorgnetteTest", "LorgnetteWithLoraTest", "RetrievalTest", "QFormerTest"]
QUICK = [
    "test_attention_outputs",
    "test_can_init_all_missing_weights",
    "test_can_use_safetensors",
    "test_config",
    "test_determinism",
    "test_feed_forward_chunking",
    "test_forward_signature",
    "test_gradient_checkpointing_enable_disable",
    "test_hidden_states_output",
    "test_initialization",
    "test_inputs_embeds",
    "test_load_save_without_tied_weights",
    "test_model_weights_reload_no_missing_tied_weights",
    "test_resize_tokens_embeddings",
    "test_save_load",
    "test_save_load_keys_to_ignore_on_save",
    "test_training",
]


# transformers' own, which its files are marked with
MARKERS = ["accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test"]
MARKERS += [f"is_{kind}_test" for kind in ("fsdp", "pipeline", "tensor_parallel", "expert_parallel", "training")]


@pytest.fixture(scope="module")
def suites(request):
    """The module with the test classes; what the mixins stand on is fetched once, from the package registry."""
    for marker in MARKERS:
        request.config.addinivalue_line("markers", f"{marker}: transformers'")
    folder = str(common_tests(Path(__file__).parents[1] / ".cache").resolve())
    sys.path.insert(0, folder)
    yield importlib.import_module("conformance.suites.test_models")
    sys.path.remove(folder)


@pytest.mark.parametrize("name", CLASSES)
def test_common_tests_that_are_quick(suites, name):
    cases = unittest.TestSuite(getattr(suites, name)(test) for test in QUICK if hasattr(getattr(suites, name), test))
    assert cases.countTestCases() > 10
    result = unittest.TestResult()
    cases.run(result)
    failed = "\n".join(f"{case}: {trace}" for case, trace in result.failures + result.errors)
    assert not failed
    assert len(result.skipped) < result.testsRun / 2
