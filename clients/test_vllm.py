"""vLLM's transformers backend: only its inspection, since its wheel has no CPU kernels for the engine."""

from pathlib import Path


def test_model_and_processor_are_inspected(install, run, folders):
    python = install("vllm", "vllm==0.33.0", own_torch=True)
    script = Path(__file__).with_name("vllm_inspection.py")
    run(python, script, folders["merged"])  # without peft, which it does not install
