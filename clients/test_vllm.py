"""vLLM's transformers backend. Its wheel has no CPU kernels, so that no engine runs here; its inspection does."""

from pathlib import Path


def test_model_and_processor_are_inspected(install, run, folders):
    python = install("vllm", "vllm==0.33.0", own_torch=True)
    script = Path(__file__).with_name("vllm_inspection.py")
    run(python, script, folders["merged"])  # without peft, which it does not install
