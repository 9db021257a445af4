"""``bench.gpu`` where it can run without a GPU: its stages on a CPU, what it makes of failures, and its page."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from audiomae import AudioMAEConfig
from bench import gpu
from bench.gpu_report import Report
from bench.gpu_stages import profile_step
from bench.rows import Row, read_rows

CPU = torch.device("cpu")
TINY = AudioMAEConfig(
    spec_size=(64, 32), embed_dim=32, depth=1, num_heads=2, decoder_dim=32, decoder_depth=2, decoder_heads=2
)


@pytest.fixture
def report(tmp_path) -> Report:
    return Report(tmp_path, {"device": "a processor", "threads": 1})


def test_a_profile_names_operators(report):
    profile_step(report, CPU, batch=2, config=TINY)
    assert "aten::" in report.text()


def test_the_page_holds_all_that_was_found_and_all_that_was_not(report):
    report.rows = [
        Row("steps", "ViT-B local", "fused", "reference", p50_ms=20.0, ratio=2.5, about=report.about),
        Row("steps", "ViT-B local", "reference", "reference", wrong="loss is off by 1", about=report.about),
    ]
    report.tests, report.red = {"passed": 3, "failed": 1}, ["tests/kernels/test_mlp.py::test_a"]
    report.skip("something", "no time")
    report.fail("another", "Traceback: it broke")
    report.write()
    page = (report.folder / "results.md").read_text()
    for text in ("20.0 ms", "loss is off by 1", "3 passed, 1 failed", "RED: tests/kernels/test_mlp.py::test_a"):
        assert text in page
    assert "Left out: something: no time." in page
    assert "it broke" in page
    assert [row.provider for row in read_rows([report.folder / "rows.json"])] == ["fused", "reference"]


def test_red_tests_of_an_operator_are_found_by_name(report):
    report.red = ["tests/kernels/test_mlp.py::test_a", "tests/kernels/test_triton.py::test_b[restore_tokens]"]
    assert report.red_tests("restore_tokens") == report.red[1:]
    assert report.red_tests("random_mask") == []


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({}, False),
        ({"red": ["a"]}, True),
        ({"failures": {"a": "b"}}, True),
        ({"rows": [Row("steps", "a", "fused", "reference", wrong="off")]}, True),
        ({"rows": [Row("steps", "a", "fa3", "reference", absent="not installed")], "skipped": {"a": "b"}}, False),
    ],
)
def test_what_makes_it_end_with_an_error(report, found, wrong):
    vars(report).update(found)
    assert report.wrong == wrong


def test_a_stage_that_raises_ends_alone_and_the_deadline_leaves_the_rest_out(tmp_path, monkeypatch):
    def measure(*args, **kwargs):
        raise RuntimeError("no such kernel")

    ran = []

    def measure_step(*args, **kwargs):
        ran.append(kwargs["task"])
        return [Row("steps", kwargs["task"], "fused", "reference", p50_ms=1.0)]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "provenance", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(gpu, "ceiling_rows", lambda *args: [])
    monkeypatch.setattr(gpu, "measure_operator", measure)
    monkeypatch.setattr(gpu, "measure_pretraining_step", measure_step)
    monkeypatch.setattr(gpu, "profile_step", measure)
    monkeypatch.setattr(gpu, "measure_finetuning_step", measure)
    monkeypatch.setattr(gpu, "measure_inference", lambda *args, **kwargs: [])
    monkeypatch.setattr(gpu, "STEP_COMPILE_S", 1)
    monkeypatch.setattr(gpu, "STEP_S", 10_000)
    options = argparse.Namespace(out=tmp_path, full=False, tests=False, operators=["mlp"], batch=1, step_batch=1)
    report = gpu.measure(options)
    assert ran == ["ViT-B local"]
    assert [row.task for row in report.rows] == ["ViT-B local"]
    assert "no such kernel" in report.failures["mlp, torch.bfloat16, batch 1"]
    assert set(report.skipped) == {"fine-tuning step", "inference"}
    assert "it needs 10000" in report.skipped["inference"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_command_says_that_there_is_no_gpu(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "bench.gpu: no GPU here, expected a CUDA or ROCm device\n")
