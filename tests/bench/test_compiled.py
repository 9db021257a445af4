"""What the kernels compile to for GPUs, read in a process that does not interpret them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mae_kernels.ops import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
FUSED = [operator for operator in OPERATORS if operator != "flash_attention"]
"""Operators with kernels of our own."""
PRODUCTS = {"patch_embed", "window_attention", "linear_masked_mse"}
"""Operators whose kernels multiply matrices."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compiled", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads((folder / "compiled.json").read_text())["kernels"]


def test_every_operator_compiles_for_every_target(kernels):
    assert {(row["operator"], row["target"]) for row in kernels} == {
        (operator, target) for operator in FUSED for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    }


def test_nothing_spills(kernels):
    assert [row for row in kernels if row["spill_bytes"]] == []


def test_tensors_are_streamed_by_128_bits(kernels):
    rows = [row for row in kernels if row["registers"] is not None and row["operator"] != "random_mask"]
    assert rows
    assert [row for row in rows if "128" not in row["load_bits"]] == []
    # Some kernels only reduce: what they write is a partial sum a program.
    stores = {(row["operator"], row["precision"], row["target"]) for row in rows if "128" in row["store_bits"]}
    assert stores == {(row["operator"], row["precision"], row["target"]) for row in rows}


def test_products_use_tensor_cores(kernels):
    rows = [row for row in kernels if row["registers"] is not None and row["precision"] == "bfloat16"]
    assert {row["operator"] for row in rows if row["tensor_core"]} == PRODUCTS & set(FUSED)


def test_enough_warps_are_resident_to_hide_latency(kernels):
    rows = [row for row in kernels if row["registers"] is not None]
    assert [row for row in rows if row["resident_warps"] < 8] == []


def test_the_command_refuses_to_read_interpreted_kernels(tmp_path):
    command = [sys.executable, "-m", "bench.compiled", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("bench.compiled: TRITON_INTERPRET is set, expected it unset")
