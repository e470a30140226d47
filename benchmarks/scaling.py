"""Check the formulas of docs/scaling.md: bytes that grow with processes, parameters and pictures.

    python -m benchmarks.scaling --stage1 MODEL --model MODEL --features CACHE

MODEL are saved models of stage 1 and of stage 2 with LoRA, CACHE a feature cache for the first with a split `train`;
`make demo` leaves all three in its folder. A training step of stage 1 runs on processes of this machine.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from accelerate import debug_launcher
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from examples.quality.steps import say
from lorgnette import LorgnetteCollator
from lorgnette.modeling.modeling_saving import BACKBONES
from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.data import load_pairs
from lorgnette.trainer.feature_cache import read_metadata


@dataclass
class Options:
    stage1: str = field(metadata={"help": "A saved model of stage 1: a folder."})
    model: str = field(metadata={"help": "A saved model of stage 2 with LoRA: a folder."})
    features: Path = field(metadata={"help": "A feature cache for the model of stage 1."})
    text_column: str = field(default="text")
    processes: int = field(default=2)
    batch_size: int = field(default=8, metadata={"help": "Pairs a process."})
    output: Path = field(default=Path("out/benchmarks/scaling.json"))


def main(argv: list[str]) -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
    with tempfile.TemporaryDirectory() as scratch:
        # first, since forking is safe only before threads start
        debug_launcher(step, (options, Path(scratch, "step.json")), num_processes=options.processes)
        measured = json.loads(Path(scratch, "step.json").read_text(encoding="utf-8"))
        rows = exchanged(options, measured) + saved(options, Path(scratch)) + cached(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"sizes": measured, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    say("| bytes | formula | predicted | measured | apart |")
    say("|---|---|---|---|---|")
    for what, formula, predicted, found in rows:
        say(f"| {what} | {formula} | {predicted:,} | {found:,} | {found / predicted - 1:+.2%} |")
    return 0


def step(options: Options, result: Path) -> None:
    """One forward and backward pass of stage 1 under DDP; writes the bytes that this process received to `result`."""
    model = AutoModel.from_pretrained(options.stage1).train()
    collator = LorgnetteCollator(AutoProcessor.from_pretrained(options.stage1), text_column=options.text_column)
    arguments = DataArguments(dataset=str(options.features), text_column=options.text_column)
    rows, _ = load_pairs(arguments, evaluate=False, seed=0)
    start = distributed.get_rank() * options.batch_size
    batch = collator(list(islice(rows, start, start + options.batch_size)))

    received = {"gathered": 0, "reduced": 0, "gradients": 0}

    def count(name: str, tensors) -> None:
        received[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def all_gather(parts, tensor, real=distributed.all_gather):
        count("gathered", parts)
        return real(parts, tensor)

    def all_reduce(tensor, real=distributed.all_reduce, **ddp):
        if not ddp:  # the contrast's; the hook counts DDP's
            count("reduced", [tensor])
        return real(tensor, **ddp)

    def hook(group, bucket):
        count("gradients", [bucket.buffer()])
        return allreduce_hook(group, bucket)

    distributed.all_reduce(longest := torch.tensor(batch["input_ids"].shape[1]), op=distributed.ReduceOp.MAX)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    parallel.register_comm_hook(None, hook)
    with mock.patch.multiple(distributed, all_gather=all_gather, all_reduce=all_reduce):
        parallel(**batch).loss.backward()
    if distributed.get_rank() == 0:
        sizes = {
            "W": distributed.get_world_size(),
            "B": options.batch_size,
            "Q": model.config.num_query_tokens,
            "D": model.config.image_text_hidden_size,
            "T": int(longest),
            "P": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        }
        result.write_text(json.dumps(sizes | received), encoding="utf-8")


def exchanged(options: Options, measured: dict[str, int]) -> list[tuple[str, str, int, int]]:
    """Bytes that a process receives in a training step of stage 1."""
    w, b, q, d, t, p = (measured[name] for name in "WBQDTP")
    embeddings = w * b * (q + 1) * d * 4
    return [
        ("stage 1 gathers, a process and step", "4 W B (Q + 1) D + 8 W (B (T + 1) + 4)",
         embeddings + 8 * w * (b * (t + 1) + 4), measured["gathered"]),
        ("stage 1's gradients and counts, a process and step", "4 W B (Q + 1) D + 12", embeddings + 12,
         measured["reduced"]),
        ("DDP's gradients, a process and step", "4 P", 4 * p, measured["gradients"]),
    ]  # fmt: skip


def saved(options: Options, scratch: Path) -> list[tuple[str, str, int, int]]:
    """Bytes of a checkpoint of stage 2, thin and full, and of AdamW's state in it."""
    model = AutoModelForImageTextToText.from_pretrained(options.model)
    model.freeze()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), scratch / "optimizer.pt")
    tensors = {value.data_ptr(): value for value in model.state_dict().values()}  # tied embeddings count once
    kept = sum(value.numel() * value.element_size() for value in tensors.values())
    for _, prefix in BACKBONES.values():  # the values do not matter for the size
        setattr(model.config, f"{prefix}_backbone", f"some/{prefix}")
        setattr(model.config, f"{prefix}_backbone_revision", "0" * 40)
    for form in ("thin", "full"):
        model.save_pretrained(scratch / form, save_format=form)
    sizes = {form: (scratch / form / "model.safetensors").stat().st_size for form in ("thin", "full")}
    return [
        ("weights, thin", "4 P", 4 * count, sizes["thin"]),
        ("weights, full", "all weights", kept, sizes["full"]),
        ("AdamW's state", "8 P", 8 * count, (scratch / "optimizer.pt").stat().st_size),
    ]


def cached(options: Options) -> list[tuple[str, str, int, int]]:
    """Bytes of the cache for each picture."""
    metadata = read_metadata(options.features)
    tokens, width = metadata["feature_shape"]
    size = torch.empty((), dtype=getattr(torch, metadata["dtype"])).element_size()
    pictures = sum(metadata["splits"].values())
    found = sum(path.stat().st_size for path in options.features.rglob("*.arrow"))
    return [("feature cache, a picture", "2 L E (fp16)", tokens * width * size, round(found / pictures))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
