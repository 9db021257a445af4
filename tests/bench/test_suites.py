"""The suites at small sizes on a CPU: who is timed, who is refused, and what rows hold."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from audiomae import AudioMAEConfig
from bench import operator_suite, step_suite
from bench.accuracy import Judge, attempt, judge_workload, results
from bench.compare import Plan
from bench.inference_suite import measure_inference
from bench.measure import measure_ceilings, peak_bytes, saved_tensor_bytes
from bench.operator_suite import measure_operator
from bench.operators import WORKLOADS, Workloads
from bench.providers import find_providers
from bench.step import build_pretraining_step
from bench.step_suite import find_shares, measure_pretraining_step
from bench.turns import Laps
from bench.workload import Sizes

CPU = torch.device("cpu")
SHORT = Plan(short=True)
SMALL = Sizes(grid=(8, 4), kept=6, dim=64, heads=2, decoder_dim=64, decoder_heads=2)
TINY = AudioMAEConfig(
    spec_size=(64, 32), embed_dim=32, depth=1, num_heads=2, decoder_dim=32, decoder_depth=2, decoder_heads=2
)


def workload(operator: str, dtype: torch.dtype = torch.float32):
    return WORKLOADS[operator](Workloads(2, "cpu", dtype, SMALL))


@pytest.mark.parametrize("operator", WORKLOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_is_right(operator, dtype):
    load = workload(operator, dtype)
    judge = judge_workload(load, dtype)
    for provider, form in find_providers(load, CPU, dtype, {}).items():
        if not isinstance(form, str):
            assert judge.find_error(results(load, form, dtype)) is None, provider


@pytest.mark.parametrize("operator", WORKLOADS)
def test_the_floor_counts_whatever_enters_and_leaves(operator):
    load = workload(operator)
    outputs = load("reference")
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    ends = load.nbytes + sum(output.nbytes for output in outputs)
    assert 0 < load.forward.read_and_written <= 1.05 * ends


def test_peers_that_cannot_run_say_why():
    providers = find_providers(workload("flash_attention"), CPU, torch.float32, {})
    assert providers["fa3"] == "runs on sm90, not on cpu"
    assert callable(providers["math"])
    assert "timm" in find_providers(workload("local_block"), CPU, torch.float32, {})
    assert "sdpa" in find_providers(workload("window_attention"), CPU, torch.float32, {})


def test_rows_of_an_operator():
    rows = measure_operator(SHORT, "window_attention", CPU, torch.float32, 2, sizes=SMALL, compiled=False)
    assert {(row.provider, row.mode) for row in rows} == {
        (provider, mode) for provider in ("reference", "fused", "sdpa") for mode in ("forward", "backward", "both")
    }
    copied, multiplied = measure_ceilings(CPU, torch.float32)
    load = workload("window_attention")
    for row in rows:
        assert row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.shape == {"batch": 2, "tokens": 32, "width": 64, "window": "4x4"}
        assert row.about["device"]
        assert 0 < row.error < 1e-5
    by_mode = {row.mode: row for row in rows if row.provider == "fused"}
    floor = load.forward
    assert by_mode["forward"].least_bytes == floor.read_and_written
    assert by_mode["both"].least_flops == floor.flops + load.backward.flops
    allowed = max(floor.read_and_written / copied, floor.flops / multiplied)
    assert by_mode["forward"].ceiling_share == pytest.approx(allowed / by_mode["forward"].p50_ms * 1e3)
    reference = next(row for row in rows if row.provider == "reference")
    assert (reference.ratio, reference.ratio_p20, reference.ratio_p80) == (1, 1, 1)
    assert reference.saved_mib > by_mode["both"].saved_mib


def test_an_operator_without_gradients_has_one_mode():
    rows = measure_operator(SHORT, "random_mask", CPU, torch.float32, 2, sizes=SMALL, compiled=False)
    assert [(row.provider, row.mode) for row in rows] == [("reference", "all"), ("fused", "all")]


def test_a_wrong_provider_has_no_time(monkeypatch):
    find = operator_suite.find_providers

    def with_liar(load, *args):
        reference = find(load, *args)["reference"]
        return {
            "reference": reference,
            "fused": lambda tensors: reference(tensors) * 1.01,
            "raising": lambda tensors: 1 / 0,
        }

    monkeypatch.setattr(operator_suite, "find_providers", with_liar)
    rows = measure_operator(SHORT, "restore_tokens", CPU, torch.float32, 2, sizes=SMALL)
    fused, raising, *timed = rows
    assert fused.provider == "fused"
    assert fused.wrong.startswith("output 0 is off by ")
    assert fused.p50_ms is None
    assert raising.wrong == "raises ZeroDivisionError: division by zero"
    assert {row.provider for row in timed} == {"reference"}


def test_an_operator_with_a_red_test_is_not_timed():
    red = "tests/kernels/test_restore_tokens.py::test_equals_rows_one_by_one"
    rows = measure_operator(SHORT, "restore_tokens", CPU, torch.float32, 2, sizes=SMALL, compiled=False, fused_red=red)
    assert [row.wrong for row in rows if row.provider == "fused"] == [red]
    assert all(row.p50_ms for row in rows if row.provider == "reference")


def test_attempt():
    assert attempt(lambda: None) is None
    assert attempt(lambda: "off") == "off"


def test_rows_of_a_step():
    rows = measure_pretraining_step(SHORT, CPU, 2, torch.float32, config=TINY, compiled=False, budget_s=0.1)
    timed = [row for row in rows if not row.absent]
    assert [row.provider for row in timed] == ["reference", "fused"]
    assert [row.provider for row in rows if row.absent] == ["reference + compile", "fused + compile"]
    for row in timed:
        assert sum(row.facts[part] for part in step_suite.PARTS) == pytest.approx(1)
        assert row.facts["clips/s"] == pytest.approx(2e3 / row.p50_ms)
        assert 0 < row.facts["model FLOPs utilisation"] < 1
        assert row.peak_mib > row.saved_mib > 0
        assert 0 < row.error < 1e-5


def test_rows_of_inference():
    rows = measure_inference(SHORT, CPU, 2, torch.float32, config=TINY, compiled=False, budget_s=0.1)
    assert {row.provider for row in rows} == {"reference", "fused", "timm"}
    for row in rows:
        assert row.shape == {"batch": 2, "tokens": 9}
        assert row.facts["clips/s"] == pytest.approx(2e3 / row.p50_ms)
        assert 0 < row.error < 1e-5
        assert row.peak_mib > 0


def test_flops_of_a_step_are_those_of_its_products():
    config = replace(TINY, decoder="global", decoder_depth=1)
    row, *_ = measure_pretraining_step(SHORT, CPU, 1, torch.float32, config=config, compiled=False, budget_s=0.1)
    dim, patches, values = 32, 8, 256
    visible = int(patches * 0.2) + 1

    def block(tokens):
        return tokens * 12 * dim * dim

    trained = block(visible) + visible * dim * dim + block(patches + 1) + (patches - 1) * dim * values
    embedded = patches * values * dim
    attention = 2 * dim * (visible**2 + (patches + 1) ** 2)
    # 2 FLOPs a product, forward once and backward twice; patches have no gradient; attention's backward computes its
    # first product again.
    most = 6 * trained + 4 * embedded + 7 * attention
    assert 0.8 * most < row.least_flops <= 1.05 * most


def test_a_gradient_in_parts_is_the_whole_one():
    step = build_pretraining_step("reference", CPU, 4, torch.float64, TINY)
    torch.testing.assert_close(step.gradient(2), step.gradient())


def test_a_step_that_computes_something_else_is_wrong():
    truth = build_pretraining_step("reference", CPU, 2, torch.float64, TINY).gradient()
    plain = build_pretraining_step("auto", CPU, 2, torch.float32, TINY).gradient()
    judge = Judge(truth, plain, torch.float32, whole=True)
    assert judge.find_error(plain) is None
    assert 0 < judge.error < 1e-5
    for what in ("loss", "gradient"):
        error = judge.find_error(plain | {what: 1.001 * plain[what]})
        assert error.startswith(f"{what} is off by ")
        assert judge.error == pytest.approx(1e-3, rel=0.01)


def test_a_bound_grows_with_the_rows_that_a_gradient_sums():
    truth, off = {"x": torch.ones(4, dtype=torch.float64)}, {"x": torch.ones(4) + 3e-6}
    assert Judge(truth, truth, torch.float32).find_error(off).startswith("x is off by ")
    assert Judge(truth, truth, torch.float32, summed=4096).find_error(off) is None


def test_shares_are_of_the_time():
    shares = find_shares(build_pretraining_step("reference", CPU, 2, torch.float32, TINY), Laps(CPU, kernels=False))
    assert list(shares) == list(step_suite.PARTS)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())


def test_peak_memory_of_a_cpu():
    def call():
        first = torch.empty(3 * 2**20, dtype=torch.uint8)
        second = torch.empty(2**20, dtype=torch.uint8)
        del first
        return second + torch.empty(2**20, dtype=torch.uint8)

    assert peak_bytes(call, CPU) == pytest.approx(4 * 2**20, rel=0.01)


def test_saved_bytes_count_storages_once_and_not_what_exists():
    x = torch.randn(1000, requires_grad=True)
    assert saved_tensor_bytes(lambda: x.exp().sum(), [x]) == 4000
    assert saved_tensor_bytes(lambda: (x * x).sum(), [x]) == 0
    assert saved_tensor_bytes(lambda: (x * x).sum(), []) == 4000
