"""A quick part of `make conformance`: transformers' common tests on our models, out of its source distribution."""

import importlib
import sys
import unittest

import pytest
from repository import ROOT

from conformance.__main__ import OURS, PROCESSOR, THEIRS, behind, table
from conformance.models import NOT_FOR, OVERRIDES
from conformance.source import common_tests


CLASSES = ["LorgnetteTest", "LorgnetteWithLoraTest", "RetrievalTest", "QFormerTest"]
QUICK = [
    "test_attention_outputs",
    "test_can_init_all_missing_weights",
    "test_causal_lm_loss_honors_shift_labels",
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
    folder = str(common_tests(ROOT / ".cache").resolve())
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


def test_each_override_has_its_reason_in_the_table(suites):
    """And each reason to skip is of a suite and a test that there are."""
    other = set()
    for name in OURS:
        if name == PROCESSOR:
            continue
        case = getattr(suites, name)
        tests = {test: getattr(case, test) for test in dir(case) if test.startswith("test_")}
        other |= {test for test, method in tests.items() if getattr(method, "__module__", "") == suites.__name__}
        for beginning in NOT_FOR[name]:
            assert any(test.startswith(beginning) for test in tests), f"{name} has no {beginning}"
    assert other == {"test_config", *OVERRIDES}  # the mixins have none, for each model's tests bring it along
    assert set(NOT_FOR) == set(OURS)


@pytest.fixture
def outcomes():
    """Of three tests, of which BLIP-2 fails two; all pass for our classes."""
    tests = {"test_a": ["passed", ""], "test_b": ["passed", ""], "test_c": ["passed", ""]}
    failing = {test: ["failed", "AssertionError"] for test in ("test_b", "test_c")}
    return {name: dict(tests) for name in OURS} | {THEIRS: tests | failing}


def test_what_passes_for_blip2_has_to_pass(outcomes):
    assert behind(outcomes) == []
    for name, title in OURS.items():
        for outcome, reason in (("failed", "AssertionError"), ("skipped", "a reason of the mixin's"), ("absent", "")):
            spoilt = outcomes | {name: outcomes[name] | {"test_a": [outcome, reason]}}
            if outcome == "absent":
                del spoilt[name]["test_a"]
            messages = behind(spoilt)
            if name != PROCESSOR:
                assert messages == [f"{title}: test_a, which passes for BLIP-2, is {outcome}"]
            elif outcome == "failed":
                assert messages == [f"{title}: test_a fails"]
        reason = next(iter(NOT_FOR[name].values()))
        assert behind(outcomes | {name: outcomes[name] | {"test_a": ["skipped", reason]}}) == []
        assert f"{title}: " in "".join(behind(outcomes | {name: {}}))
        skipped = {test: ["skipped", "a reason of the mixin's"] for test in outcomes[name]}
        assert f"{title}: " in "".join(behind(outcomes | {name: skipped}))
    assert f"| {reason} | 1 | 0 |" in table(outcomes | {name: outcomes[name] | {"test_a": ["skipped", reason]}})


def test_half_of_what_fails_for_blip2_may_fail(outcomes):
    failing = {test: ["failed", "AssertionError"] for test in ("test_b", "test_c")}
    title = OURS["LorgnetteTest"]
    once = outcomes | {"LorgnetteTest": outcomes["LorgnetteTest"] | {"test_b": failing["test_b"]}}
    assert behind(once) == []
    twice = outcomes | {"LorgnetteTest": outcomes["LorgnetteTest"] | failing}
    assert behind(twice) == [f"{title}: 2 tests fail, more than half of BLIP-2's"]
    assert behind(outcomes | {THEIRS: failing})[0].startswith("nothing passes for Blip2")
