"""`ProcessorTesterMixin` on our processor, of a tiny tokenizer and a ViT's image processor."""

import unittest

from tiny import chat_tokenizer, image_processor
from transformers_tests.test_processing_common import ProcessorTesterMixin

from conformance.models import NOT_FOR_PROCESSOR
from lorgnette import LorgnetteProcessor


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LorgnetteProcessor

    @classmethod
    def _setup_image_processor(cls):
        return image_processor()

    @classmethod
    def _setup_tokenizer(cls):
        return chat_tokenizer()

    @classmethod
    def _setup_qformer_tokenizer(cls):
        return None

    def setUp(self):
        for name, reason in NOT_FOR_PROCESSOR.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        super().setUp()

    def get_component(self, attribute, **kwargs):  # the mixin looks for a folder of it
        return None if attribute == "qformer_tokenizer" else super().get_component(attribute, **kwargs)

    @staticmethod
    def prepare_processor_dict() -> dict:
        return {"num_query_tokens": 4}
