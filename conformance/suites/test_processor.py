"""`ProcessorTesterMixin` on our processor, with a tiny tokenizer and a ViT's image processor."""

import unittest
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import tiny
from transformers_tests import test_processing_common as common

from conformance.models import skip_what_is_not_for
from lorgnette import LorgnetteProcessor


class ProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = LorgnetteProcessor

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        picture = Path(cls.enterClassContext(TemporaryDirectory()), "picture.png")
        tiny.picture().save(picture)  # instead of the Hub's
        cls.enterClassContext(mock.patch.dict(common.MODALITY_INPUT_DATA, images=[str(picture)] * 2))
        cls.enterClassContext(mock.patch.object(common, "url_to_local_path", return_value=str(picture)))

    @classmethod
    def _setup_image_processor(cls):
        return tiny.image_processor()

    @classmethod
    def _setup_tokenizer(cls):
        return tiny.chat_tokenizer()

    @classmethod
    def _setup_qformer_tokenizer(cls):
        return None

    def setUp(self):
        skip_what_is_not_for(self)
        super().setUp()

    def get_component(self, attribute, **kwargs):  # the mixin expects a folder
        return None if attribute == "qformer_tokenizer" else super().get_component(attribute, **kwargs)

    @staticmethod
    def prepare_processor_dict() -> dict:
        return {"num_query_tokens": 4}
