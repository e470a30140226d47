"""`python -m robustness.compatibility`, on a few language models and ViTs; and what it does of one that fails."""

import os
import signal
import time

import pytest
from transformers import AutoModelForCausalLM, Emu3Config, LlamaConfig

from robustness import compatibility, compatibility_steps
from robustness.compatibility import LMS, VITS, Outcome, language_models, main, table, try_models, vision_models
from robustness.tiny_configs import NotTinyError, tiny_model


def test_the_table(tmp_path, capsys):
    output = tmp_path / "docs" / "compatibility.md"
    assert main(["--only", "gpt2,qwen3,rwkv,dinov2,vit_mae", "--output", str(output)]) == 0
    lines = output.read_text(encoding="utf-8").splitlines()
    assert "| `gpt2` | works | yes |  |" in lines
    assert "| `qwen3` | works | yes |  |" in lines
    assert "| `dinov2` | works |  |" in lines
    refused = [line for line in lines if "| refused |" in line]
    assert [line.split("`")[1] for line in refused] == ["rwkv", "vit_mae"]
    assert "RwkvForCausalLM cannot be joined" in refused[0]
    assert "ViTMAEModel sees one picture differently each time" in refused[1]
    assert "3 works, 2 refused, 0 fails, 0 not tried" in capsys.readouterr().out


IN_WORDS = {
    "detr": "| refused | DetrModel is no ViT",
    "emu3": "| refused |  | Emu3ForCausalLM cannot be joined: AutoModelForCausalLM",
    "gemma4_assistant": "| not tried |  | drafts words for another model",
    "gemma4_unified_text": "| works | yes |  |",
    "musicgen": "| not tried |  | AutoModelForCausalLM cannot build it",
    "youtu": "| works | yes |  |",
    "zamba": "no: carries a state from token to token | lora has to name its target_modules, here in_proj, linear |",
}


def test_what_is_not_tried_or_needs_more_says_so_in_words(tmp_path):
    output = tmp_path / "compatibility.md"
    existing = sorted(IN_WORDS.keys() & {model_type for _, model_type, _ in [*language_models(), *vision_models()]})
    assert main(["--only", ",".join(existing), "--output", str(output)]) == 0
    lines = {line.split("`")[1]: line for line in output.read_text(encoding="utf-8").splitlines() if "| `" in line}
    assert sorted(lines) == existing
    assert [line for model_type, line in lines.items() if IN_WORDS[model_type] not in line] == []


def test_a_model_that_dies_or_hangs_or_answers_wrong_is_a_failure_and_the_others_go_on(tmp_path, monkeypatch):
    def attempt(model_type, config_class):
        if model_type == "gpt2":
            os.kill(os.getpid(), signal.SIGKILL)
        if model_type == "opt":
            time.sleep(600)
        return Outcome(LMS, model_type, "works" if model_type == "llama" else "fails", packed="yes")

    monkeypatch.setattr(compatibility, "try_language_model", attempt)
    cases = [case for case in language_models() if case[1] in ("gpt2", "opt", "llama", "qwen3")]
    outcomes = {outcome.model_type: outcome for outcome in try_models(cases, jobs=2, seconds=5)}
    verdicts = {model_type: outcome.verdict for model_type, outcome in outcomes.items()}
    assert verdicts == {"gpt2": "fails", "opt": "fails", "llama": "works", "qwen3": "fails"}
    assert "the process ended with status" in outcomes["gpt2"].reason
    assert outcomes["opt"].reason == "not done after 5 s"
    assert "| `opt` | **fails** |  | not done after 5 s |" in table(list(outcomes.values()))
    assert main(["--only", "qwen3", "--output", str(tmp_path / "table.md")]) == 1


def test_an_error_after_the_join_is_a_failure(monkeypatch):
    def wrong(built, batch):
        raise compatibility_steps.WrongOutputError("logits differ")

    monkeypatch.setattr(compatibility_steps, "check_generation", wrong)
    outcome = compatibility_steps.try_language_model("llama", LlamaConfig)
    assert (outcome.verdict, outcome.reason) == ("fails", "generate: WrongOutputError: logits differ")


def test_all_of_transformers_are_walked():
    types = [model_type for _, model_type, _ in language_models()]
    assert len(types) > 150
    assert {"llama", "mamba", "gpt2", "falcon"} <= set(types)
    kinds = {model_type: kind for kind, model_type, _ in vision_models()}
    assert {"vit", "siglip_vision_model", "dinov3_vit", "swin"} <= set(kinds)
    assert set(kinds.values()) == {VITS}


def test_what_cannot_be_made_tiny_says_why():
    with pytest.raises(NotTinyError, match="as many as you like"):
        tiny_model(LlamaConfig, lambda config: (_ for _ in ()).throw(ValueError("as many as you like")))
    missing = ImportError("A requires the timm library but it was not found. B requires the natten library but it")
    with pytest.raises(NotTinyError, match=r"^needs the libraries natten and timm, which are not installed$"):
        tiny_model(LlamaConfig, lambda config: (_ for _ in ()).throw(missing))
    model = tiny_model(LlamaConfig, AutoModelForCausalLM.from_config)
    assert sum(weight.numel() for weight in model.parameters()) < 100_000


def test_fields_of_a_config_within_go_beside_the_small_ones():
    model = tiny_model(Emu3Config, AutoModelForCausalLM.from_config, text_config={"num_hidden_layers": 3})
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.pad_token_id) == (3, 32, 0)


def test_a_type_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--only", "llama,no_such_type", "--output", str(tmp_path / "table.md")])
    assert "no_such_type" in capsys.readouterr().err
