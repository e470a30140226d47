"""Several processes: nothing that trains is without a gradient, whatever a batch holds."""

import subprocess
import sys
from pathlib import Path

from tiny_training import write_backbones


WORKER = Path(__file__).with_name("ddp_worker.py")


def test_two_processes_without_looking_for_unused_parameters(tmp_path):
    """`ddp_find_unused_parameters=False` would wait for ever for a gradient that does not come."""
    write_backbones(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with subprocess.Popen([*command, WORKER, tmp_path], stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its workers
            raise
    assert process.returncode == 0, errors[-3000:]
