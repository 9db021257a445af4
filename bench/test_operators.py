"""Every operator by every provider; with ``--full`` also how cost grows with batch, tokens, window and width."""

from dataclasses import replace

import pytest
import torch

from bench.compare import Plan, wrong
from bench.measure import ceiling_rows
from bench.operator_suite import measure_operator
from bench.operators import WORKLOADS
from bench.provenance import provenance
from bench.rows import Row
from bench.workload import VIT_B, Sizes

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CASES = [
    ("cpu", 8, torch.float32),
    pytest.param("cuda", 64, torch.bfloat16, marks=NEEDS_GPU),
    pytest.param("cuda", 512, torch.bfloat16, marks=NEEDS_GPU),
]
FINE_TUNED_KEPT = (220, 306, 512)
"""Patches that the encoder sees with 0.3 / 0.3 masked, with overlapping patches' 0.8, and with none masked."""

ENCODER = ("patch_embed", "flash_attention", "mlp", "add_layer_norm")
WINDOWED = ("window_attention", "local_block")
GROWTH = [
    *[("batch", operator, batch, VIT_B) for operator in WORKLOADS for batch in (1, 2, 4, 16, 32)],
    *[("tokens", operator, 8, replace(VIT_B, kept=kept)) for operator in ENCODER for kept in FINE_TUNED_KEPT],
    *[
        ("tokens", operator, 8, replace(VIT_B, grid=(rows, 8), kept=rows * 8 // 5))
        for operator in WORKLOADS
        if operator not in ENCODER
        for rows in (16, 32, 128)
    ],
    *[
        ("window", operator, 8, replace(VIT_B, window=window, shift=(window[0] // 2, 0)))
        for operator in WINDOWED
        for window in ((2, 2), (4, 8), (8, 8), (16, 8))
    ],
    *[
        ("width", operator, 8, replace(VIT_B, dim=dim, heads=dim // 64, decoder_dim=dim, decoder_heads=dim // 32))
        for operator in WORKLOADS
        if operator not in ("random_mask", "masked_mse")
        for dim in (384, 1024, 1280)
    ],
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("device", "batch", "dtype"), CASES)
@pytest.mark.parametrize("operator", WORKLOADS)
def test_operator(plan: Plan, rows: list[Row], operator: str, device: str, batch: int, dtype: torch.dtype) -> None:
    where = torch.device(device)
    compiled = plan.full or where.type == "cuda" or operator != "local_block"  # a minute for each on a CPU
    measured = measure_operator(plan, operator, where, dtype, batch, compiled=compiled)
    rows += ceiling_rows(where, dtype, provenance(where)) if operator == next(iter(WORKLOADS)) else []
    rows += measured
    assert not wrong(measured)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("device", "batch", "dtype"), CASES)
@pytest.mark.parametrize("kept", FINE_TUNED_KEPT)
def test_encoder_attention(plan: Plan, rows: list[Row], kept: int, device: str, batch: int, dtype: torch.dtype) -> None:
    sizes = replace(VIT_B, kept=kept)
    measured = measure_operator(
        plan, "flash_attention", torch.device(device), dtype, batch, sizes=sizes, compiled=plan.full
    )
    rows += [row for row in measured if row.absent is None]  # the first rows have said it
    assert not wrong(measured)


@pytest.mark.full
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("varies", "operator", "batch", "sizes"), GROWTH)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_growth(plan: Plan, rows: list[Row], varies: str, operator: str, batch: int, sizes: Sizes, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = torch.device(device)
    measured = measure_operator(
        plan, operator, where, dtype, batch, sizes=sizes, varies=varies, providers=("fused",), budget_s=2
    )
    rows += measured
    assert not wrong(measured)
