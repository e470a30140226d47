"""The killed commands, on tiny random models: their moments, and the folders that they may leave."""

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar

import datasets
import tiny
from tiny_training import write_backbones, write_pairs
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from lorgnette.trainer.checkpoints import fault_of
from lorgnette.trainer.feature_cache import COLUMN

from .comparing import LACKS, differences
from .killing import Moment


QFORMER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
STEPS, SAVE_STEPS = 24, 2  # steps of a run, and between checkpoints


@dataclass(frozen=True)
class FolderState:
    """The folder after a kill.

    Args:
        fell: when the kill happened, judged by the files.
        whole: the state that the next process must resume from.
        unlike: differences of that state from the uninterrupted run.
    """

    fell: str
    whole: str
    unlike: list[str]


class Case(ABC):
    """A command, the moments of new kills, and the checks of the folder.

    Args:
        work: folder of backbones and data.
    """

    name: str
    title: str
    kills: int

    def __init__(self, work: Path):
        self.work = work

    @abstractmethod
    def arguments(self, output: Path, reference: bool = False) -> list[str]:
        """Python's arguments for the command to write to `output`; the reference run deletes nothing."""

    @abstractmethod
    def moments(self, random: Random, seen: dict[str, float]) -> list[Moment]:
        """`kills` random moments in the order of the run, from the times of an uninterrupted run's files."""

    @abstractmethod
    def state_after_kill(self, output: Path, reference: Path, started_at: int) -> FolderState:
        """The folder after a kill of a process that started at `started_at`, in nanoseconds since the epoch."""

    @abstractmethod
    def resumed_from(self, log: str) -> str:
        """What a process resumed from, by new log, as in `FolderState.whole`."""


class Training(Case):
    """Stage 2: pictures of a folder, a data loader worker, random crops, dropout, evaluation, the best model kept."""

    name = "stage 2"
    title = "`stage2`: evaluation, best model, `save_total_limit: 2`, a worker, `augment`"
    kills = 9
    options: ClassVar[str] = (
        "--eval_fraction 0.25 --eval_strategy steps --eval_steps 2 --load_best_model_at_end true --augment true "
        "--dataloader_num_workers 1 --lr_scheduler_type cosine --gradient_accumulation_steps 2"
    )
    limit: ClassVar[int] = 2

    def arguments(self, output: Path, reference: bool = False) -> list[str]:
        lora = {"r": 2, "lora_dropout": 0.1}
        command = (
            f"-m lorgnette.trainer stage2 --vision {self.work}/vit --text {self.work}/llama --num_query_tokens 4 "
            f"--dataset {self.work}/pictures --output_dir {output} --max_steps {STEPS} --save_steps {SAVE_STEPS} "
            f"--per_device_train_batch_size 2 --learning_rate 1e-3 --logging_steps 1 --log_level info "
            f"--report_to none --use_cpu true --resume_from_checkpoint true {self.options}"
        ).split()
        command += ["--qformer_config", json.dumps(QFORMER), "--lora", json.dumps(lora)]
        return command if reference else [*command, "--save_total_limit", str(self.limit)]

    def moments(self, random: Random, seen: dict[str, float]) -> list[Moment]:
        def whole(step: int) -> str:
            return f"checkpoint-{step}/{TRAINER_STATE_NAME}"

        found = [moment("before the first checkpoint", seen, random, "", f"checkpoint-{SAVE_STEPS}")]
        middle = self.kills - 3
        steps = sorted(random.sample(range(2 * SAVE_STEPS, STEPS, SAVE_STEPS), middle))
        between = set(random.sample(steps, middle // 3))
        for step in steps:
            name = f"checkpoint-{step}"
            if step in between:
                found.append(moment(f"after {name}", seen, random, whole(step), f"checkpoint-{step + SAVE_STEPS}"))
            else:
                found.append(moment(f"while {name} is written", seen, random, name, whole(step)))
        found.append(moment("after the last checkpoint", seen, random, whole(STEPS), ".unfinished"))
        return [*found, moment("while the model is saved", seen, random, ".unfinished", CONFIG_NAME)]

    def state_after_kill(self, output: Path, reference: Path, started_at: int) -> FolderState:
        checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        whole = [path for path in checkpoints if fault_of(path) is None]
        found = {path: differences(path, reference / path.name) for path in checkpoints}
        unlike = [f"{path.name}: {difference}" for path in whole for difference in found[path]]
        for path in set(whole[:-1]):  # an interrupted deletion may have left all files that training needs
            unlike = [difference for difference in unlike if not difference.startswith(f"{path.name}: {LACKS}")]
        files = {path: sum(file.is_file() for file in path.rglob("*")) for path in checkpoints}
        of = {path: sum(file.is_file() for file in (reference / path.name).rglob("*")) for path in checkpoints}
        # files of an earlier killed process may remain
        saved = [output / ".unfinished", output / CONFIG_NAME]
        new = [path for path in (*checkpoints, *saved) if changed_since(path, started_at)]
        fell = [f"in the deletion of {path.name}, {files[path]} of {of[path]} files left"
                for path in checkpoints[:-1] if path in new and files[path] < of[path]]  # fmt: skip
        if saved[0] in new:
            fell.append("in the save at the end")
        elif saved[1] in new:
            fell.append("after the save at the end")
        elif checkpoints and checkpoints[-1] in new and fault_of(checkpoints[-1]) is not None:
            fell.append(
                f"in the writing of {checkpoints[-1].name}, {files[checkpoints[-1]]} of {of[checkpoints[-1]]} files"
            )
        if not fell:
            fell = [f"in training, after {checkpoints[-1].name}" if checkpoints else "before the first checkpoint"]
        return FolderState("; ".join(fell), whole[-1].name if whole else "the start", unlike)

    def resumed_from(self, log: str) -> str:
        found = re.search(r"Resuming training from checkpoint .* global step (\d+)", log)
        return f"checkpoint-{found[1]}" if found else "the start"


class Streaming(Training):
    """Stage 2: the same pictures as a stream, a constant learning rate, no evaluation."""

    name = "stage 2, a stream"
    title = "`stage2`: `streaming`, shuffled in a buffer, `save_total_limit: 1`"
    kills = 5
    options = "--streaming true --shuffle_buffer_size 5 --lr_scheduler_type constant"
    limit = 1


class Caching(Case):
    """The features of 300 pictures in shards of four."""

    name = "cache"
    title = "`cache`: 75 shards"
    kills = 3
    rows, shard = 300, 4

    def arguments(self, output: Path, reference: bool = False) -> list[str]:
        source = self.work / "rows"
        if not source.exists():
            pictures = [tiny.picture(n) for n in range(self.rows)]
            features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
            columns = {"image": pictures, "text": [f"picture {n}" for n in range(self.rows)]}
            datasets.Dataset.from_dict(columns, features=features).save_to_disk(source)
        return (
            f"-m lorgnette.trainer cache --vision {self.work}/vit --dataset {source} --output_dir {output} "
            f"--shard_size {self.shard}"
        ).split()

    def moments(self, random: Random, seen: dict[str, float]) -> list[Moment]:
        count = self.rows // self.shard
        path = f"train/{COLUMN}-{{:05}}-of-{count:05}".format
        found = []
        for n in sorted(random.sample(range(1, count), self.kills)):
            written = len(found) % 2 == 0
            begin = f"{path(n)}.unfinished" if written else path(n - 1)
            what = "written" if written else "made"
            found.append(moment(f"while shard {n} is {what}", seen, random, begin, path(n)))
        return found

    def state_after_kill(self, output: Path, reference: Path, started_at: int) -> FolderState:
        shards = [path for path in output.glob("train/*") if path.suffix != ".unfinished"]
        theirs = reference / "train"
        unlike = [f"{path.name}/{name}" for path in shards for name in differences(path, theirs / path.name)]
        cut = [
            f"in the writing of {path.stem}" for path in output.rglob("*.unfinished") if changed_since(path, started_at)
        ]
        return FolderState(cut[0] if cut else "between shards", f"{len(shards)} whole shards", unlike)

    def resumed_from(self, log: str) -> str:
        found = re.search(r"(\d+) of \d+ shards are complete already", log)
        return f"{found[1]} whole shards" if found else "the start"


class Exporting(Case):
    """Export the first case's model in full, with the check by a process without lorgnette."""

    name = "export"
    title = "`hub_upload --export-dir`"
    kills = 3

    def arguments(self, output: Path, reference: bool = False) -> list[str]:
        command = f"-m lorgnette.hub_upload {self.work}/reference-0 --repo-id me/eyes --license mit --dry-run"
        return [*command.split(), "--export-dir", str(output / "export")]

    def moments(self, random: Random, seen: dict[str, float]) -> list[Moment]:
        folder = ".unfinished-export/export"
        written = max((path for path in seen if path.startswith(f"{folder}/")), key=seen.__getitem__)
        writing = [moment("while the export is written", seen, random, folder, written) for _ in range(self.kills - 1)]
        return [*writing, moment("while a process without lorgnette checks it", seen, random, written, "export")]

    def state_after_kill(self, output: Path, reference: Path, started_at: int) -> FolderState:
        if (output / "export").exists():
            return FolderState("after the end", "the start", differences(output / "export", reference / "export"))
        files, of = (
            sum(path.is_file() and path.suffix != ".pyc" for path in folder.rglob("*"))
            for folder in (output, reference)
        )
        return FolderState(f"in the writing, {files} of {of} files" if files < of else "in the trial", "the start", [])

    def resumed_from(self, log: str) -> str:
        return "the start"


def moment(name: str, seen: dict[str, float], random: Random, begin: str, end: str) -> Moment:
    """A random moment between two paths, timed from the last path before it, which works on a busy machine too.

    Args:
        seen: path to the time at which an uninterrupted run made it.
        begin: a path; "" for the start of the process.
        end: a path.
    """
    last = seen.get(end, 0.0)  # a path that was never observed took no time
    first = seen.get(begin, last) if begin else 0.0
    when = random.uniform(first, max(first, last))
    lasting = (path for path in seen if "unfinished" not in path.removeprefix(".unfinished-"))
    after = max((path for path in lasting if first < seen[path] <= when), key=seen.__getitem__, default=begin)
    return Moment(name, after, when - seen.get(after, 0.0))


def changed_since(path: Path, time_ns: int) -> bool:
    """Whether a file in a folder was made or deleted since then."""
    return path.exists() and any(one.stat().st_mtime_ns >= time_ns for one in (path, *path.rglob("*")))


CASES = (Training, Streaming, Caching, Exporting)


def write_parts(work: Path) -> None:
    """Write the cases' backbones and pictures."""
    write_backbones(work)
    write_pairs(work / "pictures")
