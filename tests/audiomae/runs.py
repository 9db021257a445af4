"""Runs of the pre-training command with a tiny model on the demo clips, and what they leave."""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from audiomae.pretrain import main

TINY = shlex.split(
    "--model.spec-size 64 128 --model.embed-dim 32 --model.depth 2 --model.num-heads 2 "
    "--model.decoder-dim 16 --model.decoder-depth 2 --model.decoder-heads 2 "
    "--batch-size 42 --repeats 1 --workers 0 --warmup-epochs 1 --log-every 1"
)


FLAGS = ("--epochs", "3", "--picture-every", "0")


def run(output: Path, *flags: str) -> list[dict[str, float]]:
    main([*TINY, "--output-dir", str(output), *flags])
    return read_log(output)


def read_log(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(log: list[dict[str, float]]) -> torch.Tensor:
    return torch.tensor([record["loss"] for record in log], dtype=torch.float64)


def torchrun(output: Path, *flags: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "audiomae.pretrain", *TINY, "--output-dir", str(output), "--device", "cpu", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def two_machines(first: Sequence[str], second: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """Start a rank each on what stand for two machines, with flags of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def start(rank: int, flags: Sequence[str]) -> subprocess.Popen[str]:
        environment = {**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": str(rank)}
        command = [sys.executable, "-m", "audiomae.pretrain", *TINY, "--device", "cpu", *flags]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    processes = [start(rank, flags) for rank, flags in enumerate((first, second))]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, said, strict=True)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of three steps."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(output, *FLAGS)
    return output


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs logged and learnt the same, bit for bit."""
    assert losses(read_log(one)).tolist() == losses(read_log(other)).tolist()
    weights = load_file(other / "weights.safetensors")
    for name, tensor in load_file(one / "weights.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def assert_same_curve(one: Path, other: Path) -> None:
    """Assert that two runs logged the same up to rounding."""
    torch.testing.assert_close(losses(read_log(one)), losses(read_log(other)), rtol=1e-5, atol=0)
