"""What loading and generating do no more than once: models built, numbers drawn, weights read, logits computed."""

from collections import Counter

import pytest
import torch
from tiny_forms import hub_with_backbones, joined, load
from tiny_models import VOCAB_SIZE, inputs, model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import LogitsProcessorList

from lorgnette import LorgnetteModel
from lorgnette.modeling import modeling_saving
from lorgnette.modeling.modeling_lorgnette import ImageTokenLogitsProcessor
from lorgnette.modeling.modeling_saving import backbone_checksums, checksum


class Drawn(TorchDispatchMode):
    """Counts the numbers that are drawn at random, except for weights without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default) and not args[0].is_meta:
            self.numbers += args[0].numel()
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("save_format", ["thin", "full", "merged"])
def test_a_load_builds_one_model_and_draws_no_weights(save_format: str, tmp_path, monkeypatch):
    hub_with_backbones(tmp_path / "hub", monkeypatch)
    joined().save_pretrained(tmp_path / "saved", save_format=save_format)
    built = Counter()
    original = LorgnetteModel.__init__

    def counted(self, *args, **kwargs) -> None:
        built["models"] += 1
        original(self, *args, **kwargs)

    monkeypatch.setattr(LorgnetteModel, "__init__", counted)
    with Drawn() as drawn:
        load(tmp_path / "saved")
    assert built["models"] == 1
    # transformers draws the weights of a backbone that its files lack, as the ViT's pooler, which is not read
    pooler = [value for key, value in load(tmp_path / "saved").named_parameters() if ".pooler." in key]
    assert drawn.numbers <= sum(value.numel() for value in pooler)


def test_a_weight_of_two_names_is_read_once(monkeypatch):
    tied = nn.Module()
    tied.backbones = ("language_model",)
    weight = torch.randn(300, 100)
    read = []
    monkeypatch.setattr(modeling_saving, "checksum", lambda tensor: read.append(tensor) or checksum(tensor))
    names = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    checksums = backbone_checksums(tied, dict.fromkeys(names, weight))
    assert len(read) == 1
    assert checksums == dict.fromkeys(names, checksum(weight))


@pytest.mark.parametrize("shape", [(1,), (3,), (1024, 2), (64, 1024), (65, 1031), (300, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_knows_each_number_and_its_place(shape: tuple[int, ...], dtype: torch.dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    changed = [weight.clone(), weight.flip(0), weight.roll(1, -1), -weight, weight * 2]
    changed[0].flatten()[-1] += 1
    different = [other for other in changed if not torch.equal(other, weight)]
    assert checksum(weight.clone()) == checksum(weight)
    assert len({checksum(weight), *map(checksum, different)}) == 1 + len(different)


def test_blocks_in_another_order_have_another_checksum():
    weight = torch.randn(4, 128, 2048)  # each is a block of sums
    assert checksum(weight.flip(0)) != checksum(weight)
    assert checksum(weight.transpose(0, 1)) != checksum(weight)


def test_the_head_computes_the_last_position_of_the_prompt_alone():
    built, batch = model().eval(), inputs()
    shapes = []
    built.get_output_embeddings().register_forward_hook(
        lambda _, args, __: shapes.append((args[0].shape[:2], args[0].is_contiguous()))
    )
    built.generate(**batch, max_new_tokens=3, do_sample=False)
    assert shapes == [((len(batch["input_ids"]), 1), True)] * 3


@pytest.mark.parametrize("in_place", [False, True])
def test_scores_are_copied_where_someone_reads_them(in_place: bool):
    scores = torch.zeros(2, 8)
    processed = ImageTokenLogitsProcessor(LogitsProcessorList(), 5, in_place)(torch.tensor([[5, 1], [5, 2]]), scores)
    assert (processed is scores) is in_place
    assert (processed[:, 5] == -torch.inf).all()
    assert scores.isinf().any().item() is in_place


def test_logits_that_are_asked_for_are_the_models_own():
    built, batch = model().eval(), inputs(image_token_id=VOCAB_SIZE - 1)
    built.config.image_token_id = VOCAB_SIZE - 1  # inside the table
    asked = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    outputs = built.generate(**batch, **asked, output_logits=True, output_scores=True)
    assert torch.stack(outputs.logits).isfinite().all()
    assert (torch.stack(outputs.scores)[..., -1] == -torch.inf).all()
