"""`ModelTesterMixin`, `TrainingTesterMixin` and `ConfigTester` on our models, and on BLIP-2 beside them."""

import unittest

import pytest
import torch
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from conformance.models import (
    NOT_FOR_STAGE_1,
    Blip2Tester,
    GenerationTester,
    LorgnetteTester,
    LorgnetteWithLoraTester,
    QFormerTester,
    RetrievalTester,
    Tester,
)


class Common(ModelTesterMixin):
    """What all have: the tester, and the config's tests."""

    model_tester_class: type[Tester]
    _is_composite = True
    additional_model_inputs = ("input_ids", "pixel_values")  # beside the main one, where a mixin makes its own batch

    @classmethod
    def setUpClass(cls) -> None:
        cls.all_model_classes = (cls.model_tester_class.model_class,)

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = self.model_tester_class(self)

    def test_config(self) -> None:
        config_class = self.model_tester.model_class.config_class
        ConfigTester(self, config_class=config_class, has_text_modality=False).run_common_tests()


class Ours(Common):
    """What is different on purpose; `OVERRIDES` in `conformance/models.py` says why."""

    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        with pytest.raises(ValueError, match=r"lacks \d+ weights of its backbones"):
            super().test_model_weights_reload_no_missing_tied_weights()


class Generation(Common, TrainingTesterMixin):
    model_tester_class: type[GenerationTester]

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels:  # the mixin knows who takes labels by the names of models in transformers
            image = inputs["input_ids"] == self.model_tester.image_token_id
            inputs["labels"] = inputs["input_ids"].masked_fill(image, -100)
        return inputs


class LorgnetteTest(Ours, Generation, unittest.TestCase):
    model_tester_class = LorgnetteTester


class LorgnetteWithLoraTest(Ours, Generation, unittest.TestCase):
    model_tester_class = LorgnetteWithLoraTester


class Blip2Test(Generation, unittest.TestCase):
    model_tester_class = Blip2Tester


class RetrievalTest(Ours, unittest.TestCase):
    model_tester_class = RetrievalTester

    def setUp(self) -> None:
        for name, reason in NOT_FOR_STAGE_1.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        super().setUp()


class QFormerTest(Common, unittest.TestCase):
    model_tester_class = QFormerTester
    _is_composite = False
