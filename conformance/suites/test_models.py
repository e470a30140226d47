"""`ModelTesterMixin`, `TrainingTesterMixin` and `ConfigTester` on our models and on BLIP-2."""

import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers_tests import test_modeling_common
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_training_mixin import TrainingTesterMixin

from conformance.models import (
    QUERIES,
    Blip2Tester,
    GenerationTester,
    LorgnetteTester,
    LorgnetteWithLoraTester,
    QFormerTester,
    RetrievalTester,
    Tester,
    skip_what_is_not_for,
)
from lorgnette.assembly import guards
from lorgnette.modeling import modeling_base


class Common(test_modeling_common.ModelTesterMixin):
    """Common base: the tester, and the config's tests."""

    model_tester_class: type[Tester]
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # otherwise skipped if a file does not start with a year
    additional_model_inputs = (
        "input_ids",
        "pixel_values",
    )  # for mixins that make their own batch

    @classmethod
    def setUpClass(cls) -> None:
        cls.all_model_classes = (cls.model_tester_class.model_class,)

    def setUp(self) -> None:
        skip_what_is_not_for(self)
        torch.manual_seed(0)
        self.model_tester = self.model_tester_class(self)

    def test_config(self) -> None:
        config_class = self.model_tester.model_class.config_class
        ConfigTester(self, config_class=config_class, has_text_modality=False).run_common_tests()


@contextmanager
def missing_weights_allowed() -> Iterator[None]:
    """Missing weights are initialised at random within the block, as in transformers."""
    with mock.patch.object(modeling_base, "refuse_missing"), mock.patch.object(guards, "_compare_shapes"):
        yield


class Ours(Common):
    """Intended differences; `OVERRIDES` in `conformance/models.py` says why."""

    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        with pytest.raises(ValueError, match=r"lacks \d+ weights of its backbones"):
            super().test_model_weights_reload_no_missing_tied_weights()
        with missing_weights_allowed():
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_can_init_all_missing_weights(self) -> None:
        with missing_weights_allowed():
            super().test_can_init_all_missing_weights()


class Generation(Common, TrainingTesterMixin):
    model_tester_class: type[GenerationTester]

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels:  # the mixin decides by the names of transformers' models which take labels
            image = inputs["input_ids"] == self.model_tester.image_token_id
            inputs["labels"] = inputs["input_ids"].masked_fill(image, -100)
        return inputs


class OurGeneration(Ours, Generation):
    def test_causal_lm_loss_honors_shift_labels(self) -> None:
        words = {name: value[:, QUERIES:] for name, value in self.model_tester.inputs().items() if value.dim() == 2}
        mapping = {self.model_tester.get_config().model_type: self.model_tester.model_class.__name__}
        with (
            mock.patch.object(self.model_tester, "inputs", return_value=words),
            mock.patch.dict(test_modeling_common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, mapping),
        ):
            super().test_causal_lm_loss_honors_shift_labels()


class LorgnetteTest(OurGeneration, unittest.TestCase):
    model_tester_class = LorgnetteTester


class LorgnetteWithLoraTest(OurGeneration, unittest.TestCase):
    model_tester_class = LorgnetteWithLoraTester

    def test_can_init_all_missing_weights(self) -> None:
        draw = LoraLayer.reset_lora_parameters

        def seeded(*args, **kwargs) -> None:  # as the mixin initialises all others
            torch.manual_seed(42)
            draw(*args, **kwargs)

        with mock.patch.object(LoraLayer, "reset_lora_parameters", seeded):
            super().test_can_init_all_missing_weights()


class Blip2Test(Generation, unittest.TestCase):
    model_tester_class = Blip2Tester


class RetrievalTest(Ours, TrainingTesterMixin, unittest.TestCase):
    model_tester_class = RetrievalTester


class QFormerTest(Common, TrainingTesterMixin, unittest.TestCase):
    model_tester_class = QFormerTester
    _is_composite = False

    def test_torch_save_load(self) -> None:
        model_class = self.model_tester.model_class
        with mock.patch.object(test_modeling_common, "MODEL_MAPPING", {model_class.config_class: model_class}):
            super().test_torch_save_load()
