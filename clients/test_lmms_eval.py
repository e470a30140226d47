"""lmms-eval's own `--model huggingface`, on a local task; and a pipeline that needs torchvision, as lmms-eval does."""

import json
import shutil
from pathlib import Path

import datasets
import torch
from tiny import picture

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor


TASK = Path(__file__).with_name("lmms_task")
# its evaluator imports a module that filelock 4 lacks
REQUIREMENTS = ("lmms-eval==0.7.3", "peft", "filelock<4")
ANY_TO_ANY = """
import importlib.util, json, sys
from transformers import pipeline

assert importlib.util.find_spec("lorgnette") is None
folder, picture = sys.argv[1:]
settings = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 5, "do_sample": False}}
said = []
for task in ("any-to-any", "image-text-to-text"):
    pipe = pipeline(task, model=folder, trust_remote_code=True)
    said.append(pipe(images=picture, text=pipe.processor.build_prompt("What?"), **settings)[0]["generated_text"])
print(json.dumps(said))
"""


def test_its_answers_are_the_models(install, run, folders, tmp_path):
    python = install("lmms-eval", *REQUIREMENTS)
    rows = [{"image": picture(number), "question": "What is this?", "answer": "a cat"} for number in range(3)]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    shutil.copytree(TASK, tmp_path / "task")
    arguments = f"pretrained={folders['full']},trust_remote_code=True,device=cpu,device_map=cpu"
    command = ["-m", "lmms_eval", "--model", "huggingface", "--model_args", arguments, "--tasks", "lorgnette_pictures"]
    run(python, *command, "--include_path", "task", "--batch_size", 1, "--output_path", "out", "--log_samples")
    (samples,) = (tmp_path / "out").rglob("*_samples_*.jsonl")
    told = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]

    model = LorgnetteForConditionalGeneration.from_pretrained(folders["full"], dtype=torch.bfloat16).eval()
    processor = LorgnetteProcessor.from_pretrained(folders["full"])
    assert len(told) == len(rows)
    for sample in told:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=picture(sample["doc_id"]), text=prompt, return_tensors="pt")
        ids = model.generate(
            **inputs.to(dtype=torch.bfloat16),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["filtered_resps"].strip() == expected.strip()


def test_any_to_any_says_what_image_text_to_text_does(install, run, folders, tmp_path):
    (tmp_path / "any.py").write_text(ANY_TO_ANY, encoding="utf-8")
    said = json.loads(run(install("lmms-eval", *REQUIREMENTS), "any.py", folders["full"], folders["cat.jpg"]))
    assert said[0] == said[1] != ""
