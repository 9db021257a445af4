"""The stages of ``bench.gpu`` where they can run without a GPU: on a CPU, at small sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from audiomae import AudioMAEConfig
from bench import accuracy
from bench.gpu_report import Report
from bench.gpu_stages import measure_operator, measure_step, profile_step
from bench.operators import WORKLOADS, Workloads

CPU = torch.device("cpu")
TINY = AudioMAEConfig(
    spec_size=(64, 32), embed_dim=32, depth=1, num_heads=2, decoder_dim=32, decoder_depth=2, decoder_heads=2
)


@pytest.fixture
def report(tmp_path) -> Report:
    report = Report(tmp_path, {"device": "a processor"})
    report.ceilings = {"copy GB/s": 10.0, "bfloat16 TFLOP/s": 0.1, "float32 TFLOP/s": 0.1}
    return report


def test_a_row_holds_times_ratios_and_the_floor(report):
    measure_operator(report, "restore_tokens", CPU, torch.bfloat16, batch=1)
    forward, both = report.operators
    assert (forward["mode"], both["mode"]) == ("forward", "forward + backward")
    for row in (forward, both):
        assert row["over eager"] == pytest.approx(row["eager"] / row["fused"])
        assert row["over compiled"] == pytest.approx(row["compiled"] / row["fused"])
        assert row["fused p20"] <= row["fused"] <= row["fused p80"]
    floor = WORKLOADS["restore_tokens"](Workloads(1, "cpu", torch.bfloat16)).forward
    assert forward["floor"] == pytest.approx(floor.read_and_written / 10e9 * 1e3 / forward["fused"])


def test_an_operator_with_a_red_test_is_not_timed(report):
    report.red = ["tests/kernels/test_restore_tokens.py::test_equals_rows_one_by_one"]
    measure_operator(report, "restore_tokens", CPU, torch.bfloat16, batch=1)
    assert report.operators == [{"operator": "restore_tokens", "dtype": "bfloat16", "batch": 1, "error": report.red[0]}]


def test_an_operator_that_is_wrong_is_not_timed(report, monkeypatch):
    run = accuracy.run

    def off_by_a_hundredth(workload, impl, dtype, exact=False):
        return {what: x * (1.01 if impl == "auto" else 1) for what, x in run(workload, impl, dtype, exact).items()}

    monkeypatch.setattr(accuracy, "run", off_by_a_hundredth)
    measure_operator(report, "restore_tokens", CPU, torch.float32, batch=1)
    assert "fused" not in report.operators[0]
    assert report.operators[0]["error"].startswith("restore_tokens, auto, torch.float32: output 0 is off by ")
    assert report.red


@pytest.mark.parametrize("operator", WORKLOADS)
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_every_form_is_right_at_the_sizes_of_the_paper(operator, impl):
    assert accuracy.find_errors(operator, impl, "cpu", torch.float32, batch=1) == []


def test_a_step_and_its_profile_are_reported(report):
    measure_step(report, CPU, "auto", compiled=False, batch=2, config=TINY)
    profile_step(report, CPU, batch=2, config=TINY)
    (row,) = report.steps
    assert row["clips/s"] == pytest.approx(2e3 / row["ms"])
    report.skip("something", "no time")
    report.fail("another", "Traceback: it broke")
    report.write()
    page = (report.folder / "results.md").read_text()
    assert "| fused | False | 2 |" in page
    assert "aten::" in page
    assert "Left out: something: no time." in page
    assert "it broke" in page
    assert json.loads((report.folder / "results.json").read_text())["steps"] == report.steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_command_says_that_there_is_no_gpu(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "bench.gpu: no GPU here, expected a CUDA or ROCm device\n")
