"""Tiny random models for transformers' testers: ours and BLIP-2's, with the same parts and sizes."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar
from unittest import TestCase

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    ViTConfig,
)

from lorgnette import (
    LorgnetteConfig,
    LorgnetteForConditionalGeneration,
    LorgnetteForImageTextRetrieval,
    LorgnetteQFormerConfig,
    LorgnetteQFormerModel,
    LorgnetteRetrievalConfig,
)


# test -> why ours differs
OVERRIDES = {
    "test_can_init_all_missing_weights": (
        "a file without the backbones' weights is an error here: the mixin's random ones are allowed for the test, and "
        "LoRA's, which peft draws, come from its seed"
    ),
    "test_causal_lm_loss_honors_shift_labels": "on words alone: the mixin has labels on placeholders, an error here",
    "test_model_weights_reload_no_missing_tied_weights": (
        "a file without the backbones' weights is an error here, which is asserted first; then it is allowed"
    ),
    "test_torch_save_load": "the Q-Former is a part, and in no auto class, by which the mixin looks for it",
}
# test class -> prefix of a test's name -> why it is not run on ours
NOT_FOR: dict[str, dict[str, str]] = {
    "LorgnetteTest": {
        "test_enable_input_require_grads_with_gradient_checkpointing": (
            "looks for gradients of the language model's table of words, which is frozen"
        ),
        "test_keep_in_fp32_modules": "no module is kept in float32 where the others are not",
    },
    "RetrievalTest": {
        **dict.fromkeys(
            ("test_attention_outputs", "test_hidden_states_output", "test_retain_grad_hidden"),
            "losses and similarities come out of stage 1, not states: those are its Q-Former's",
        ),
        "test_batching_equivalence": "a pair alone in its batch is an error: there is nothing to tell it from",
        "test_causal_lm_loss_honors_shift_labels": "its texts are their own labels",
        "test_eager_matches_sdpa_inference": "compares hidden states, which stage 1 does not return: its Q-Former does",
        "test_keep_in_fp32_modules": "no module is kept in float32 where the others are not",
        "test_resize": "refused: head and [DEC] hang on the vocabulary",
        "test_sdpa_can_dispatch_composite_models": "looks for a language model, which stage 1 has none of",
        "test_training_gradient_checkpointing": (
            "the mixin follows one call of a layer a step, stage 1 makes three; tests/modeling has its gradients"
        ),
        "test_training_overfit": "the mixin's batch has no pictures, and one caption twice: nothing to tell apart",
    },
    "QFormerTest": {
        **dict.fromkeys(
            (
                "test_attn_implementation_composite_models",
                "test_can_set_attention_dynamically_composite_model",
                "test_internal_model_config_and_subconfig_are_same",
                "test_sdpa_can_dispatch_composite_models",
            ),
            "the Q-Former is not made of several models",
        ),
        **dict.fromkeys(
            (
                "test_causal_lm_loss_honors_shift_labels",
                "test_enable_input_require_grads_with_gradient_checkpointing",
                "test_training",
            ),
            "the Q-Former has no loss of its own",
        ),
        "test_keep_in_fp32_modules": "no module is kept in float32 where the others are not",
    },
    "ProcessorTest": {
        "test_apply_chat_template_assistant_mask": "refused: labels are the collator's business",
        **dict.fromkeys(
            ("test_chat_template_jinja_kwargs", "test_chat_template_message_objects"),
            "its template wants lists as contents; those of text-only LMs want strings",
        ),
        "test_init_arguments_not_in_class_attributes": "chat_template is a property: the tokenizer's, saved with it",
        "test_processor_from_and_save_pretrained_as_nested_dict": "wants a folder of each tokenizer; one is optional",
    },
}
NOT_FOR["LorgnetteWithLoraTest"] = NOT_FOR["LorgnetteTest"] | {
    "test_reverse_loading_mapping": (
        "LoRA's tensors have no names in the original format: the weights are saved as they are named in memory"
    ),
}


def skip_what_is_not_for(case: TestCase) -> None:
    """Skip the test of a suite that [`NOT_FOR`] names, with its reason."""
    for name, reason in NOT_FOR.get(type(case).__name__, {}).items():
        if case._testMethodName.startswith(name):
            case.skipTest(reason)


WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 99
IMAGE, PATCH, QUERIES, TEXT = 32, 8, 4, 10
PATCHES = (IMAGE // PATCH) ** 2
BATCH = 7  # the mixins pad smaller batches with random ids, which are not placeholders

_ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 37,
}
_VISION = _ENCODER | {"image_size": IMAGE, "patch_size": PATCH}
_WORDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_QFORMER = _ENCODER | {"encoder_hidden_size": WIDTH, "vocab_size": VOCABULARY, "max_position_embeddings": 64}


class Tester(ABC):
    """The mixins' interface of a model tester; `parent` is the test case."""

    model_class: type
    batch_size, is_training = BATCH, True
    hidden_size, num_hidden_layers, num_attention_heads = WIDTH, LAYERS, HEADS
    image_size, patch_size, num_channels = IMAGE, PATCH, 3

    def __init__(self, parent: Any):
        self.parent = parent

    @abstractmethod
    def get_config(self) -> PreTrainedConfig:
        """A new config with the sizes above."""

    @abstractmethod
    def inputs(self) -> dict[str, torch.Tensor]:
        """A batch, drawn from torch's generator."""

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        return self.get_config(), self.inputs()


class GenerationTester(Tester):
    """Stage 2: `(B, Q + T)` tokens, of which the first Q are an image's placeholders."""

    seq_length = encoder_seq_length = QUERIES + TEXT
    image_token_id = 3  # low: the mixins shrink the vocabulary

    def inputs(self) -> dict[str, torch.Tensor]:
        words = torch.randint(4, VOCABULARY, (BATCH, TEXT))
        image = torch.full((BATCH, QUERIES), self.image_token_id)
        input_ids = torch.cat([image, words], dim=1)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(BATCH, 3, IMAGE, IMAGE),
        }


class LorgnetteTester(GenerationTester):
    model_class = causal_lm_class = LorgnetteForConditionalGeneration
    lora: ClassVar[dict[str, Any] | None] = None

    def get_config(self) -> LorgnetteConfig:
        return LorgnetteConfig(
            vision_config=ViTConfig(**_VISION),
            qformer_config=LorgnetteQFormerConfig(**_QFORMER),
            text_config=LlamaConfig(**_ENCODER, **_WORDS, max_position_embeddings=128),
            num_query_tokens=QUERIES,
            image_token_id=self.image_token_id,
            lora_config=self.lora,
        )


class LorgnetteWithLoraTester(LorgnetteTester):
    lora: ClassVar = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


class Blip2Tester(GenerationTester):
    model_class = causal_lm_class = Blip2ForConditionalGeneration

    def get_config(self) -> Blip2Config:
        opt = {name: value for name, value in _ENCODER.items() if name != "intermediate_size"}
        text = OPTConfig(**opt, **_WORDS, ffn_dim=37, word_embed_proj_dim=WIDTH, max_position_embeddings=128)
        return Blip2Config(
            vision_config=Blip2VisionConfig(**_VISION),
            qformer_config=Blip2QFormerConfig(**_QFORMER),
            text_config=text,
            num_query_tokens=QUERIES,
            image_token_index=self.image_token_id,
        )


class RetrievalTester(Tester):
    """Stage 1: `(B, T)` different texts, and as many pictures."""

    model_class = LorgnetteForImageTextRetrieval
    seq_length = encoder_seq_length = TEXT

    def get_config(self) -> LorgnetteRetrievalConfig:
        return LorgnetteRetrievalConfig(
            vision_config=ViTConfig(**_VISION),
            qformer_config=LorgnetteQFormerConfig(**_QFORMER, use_qformer_text_input=True, dec_token_id=VOCABULARY - 1),
            num_query_tokens=QUERIES,
            image_text_hidden_size=16,
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        input_ids = torch.randint(3, VOCABULARY - 2, (BATCH, TEXT))
        pixel_values = torch.rand(BATCH, 3, IMAGE, IMAGE)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}


class QFormerTester(Tester):
    """The Q-Former with its text half: `(B, L, E)` features and `(B, T)` texts."""

    model_class = LorgnetteQFormerModel
    is_training = False  # it has no loss
    seq_length = encoder_seq_length = QUERIES + TEXT

    def get_config(self) -> LorgnetteQFormerConfig:
        return LorgnetteQFormerConfig(**_QFORMER, use_qformer_text_input=True, num_query_tokens=QUERIES)

    def inputs(self) -> dict[str, torch.Tensor]:
        input_ids = torch.randint(3, VOCABULARY, (BATCH, TEXT))
        features = torch.rand(BATCH, PATCHES + 1, WIDTH)
        return {
            "encoder_hidden_states": features,
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
