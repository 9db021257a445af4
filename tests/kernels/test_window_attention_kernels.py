"""The kernels of ``window_attention`` where their index arithmetic, tiles and passes could go wrong."""

from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from mae_kernels import window_attention
from mae_kernels.windows import padded_grid
from torch import Tensor
from triton.runtime import interpreter

from .calls import KERNEL_DEVICE, KERNEL_DTYPES
from .tolerance import assert_kernel_accurate, with_gradients

# grid, window, shift, heads, head dim
CUTS: dict[str, tuple] = {
    "4x4": ((8, 8), (4, 4), (0, 0), 2, 32),
    "4x4-shifted-along-one-axis": ((12, 4), (4, 4), (2, 0), 2, 20),
    "4x4-shifted": ((8, 8), (4, 4), (2, 2), 3, 4),
    "4x4-shifted-by-more-than-a-window": ((8, 12), (4, 4), (7, 5), 1, 32),
    "4x4-heads-of-64": ((4, 8), (4, 4), (0, 3), 1, 64),
    "4x4-heads-of-128": ((4, 4), (4, 4), (1, 1), 1, 128),
    "3x5": ((6, 10), (3, 5), (1, 4), 2, 4),
    "3x5-padded": ((7, 8), (3, 5), (2, 1), 1, 12),
    "one-row": ((1, 9), (1, 4), (0, 3), 1, 8),
    "5x6": ((5, 12), (5, 6), (0, 2), 2, 16),
    "window-past-the-grid": ((3, 5), (4, 7), (3, 6), 2, 8),
    "7x7": ((7, 14), (7, 7), (3, 3), 2, 32),
    "7x7-padded": ((9, 8), (7, 7), (5, 2), 1, 20),
    "8x8": ((8, 8), (8, 8), (4, 4), 2, 32),
    "8x8-heads-of-64": ((8, 8), (8, 8), (0, 4), 1, 64),
    "9x9": ((9, 9), (9, 9), (4, 0), 2, 4),
    "16x16": ((16, 16), (16, 16), (8, 8), 1, 8),
    "16x16-padded": ((5, 18), (16, 16), (0, 20), 1, 4),
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swin": {"bias": "tensor"},
    "number": {"scale": -1.5},
    "v2": {"cosine": True, "scale": "tensor", "bias": "tensor"},
    "cosine": {"cosine": True},
    "cosine-eps": {"cosine": True, "cosine_eps": 20.0, "scale": "tensor"},
}


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round float32 to the nearest bfloat16, as GPUs do; Triton's interpreter cuts it off."""
    if KERNEL_DEVICE == "cuda":
        return
    convert = interpreter._convert_float

    def round_to_nearest(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", round_to_nearest)


def arguments(cut: tuple, kind: str, *, batch: int = 1) -> tuple[dict[str, Tensor], dict[str, Any]]:
    grid, window, shift, num_heads, dim = cut
    generator = torch.Generator().manual_seed(0)
    area = window[0] * window[1]
    tensors = {
        "qkv": torch.randn(batch, grid[0] * grid[1], 3 * num_heads * dim, generator=generator),
        "bias": torch.randn(num_heads, area, area, generator=generator),
        "scale": 0.5 + torch.rand(num_heads, generator=generator),
    }
    settings = KINDS[kind]
    options = {"num_heads": num_heads, "grid": grid, "window": window, "shift": shift}
    options |= {name: value for name, value in settings.items() if not isinstance(value, str)}
    return {
        name: tensor.to(KERNEL_DEVICE)
        for name, tensor in tensors.items()
        if name == "qkv" or settings.get(name) == "tensor"
    }, options


def assert_accurate(cut: tuple, kind: str, dtype: torch.dtype, *, batch: int = 1) -> None:
    tensors, options = arguments(cut, kind, batch=batch)
    kernel, reference = (partial(window_attention, **options, impl=impl) for impl in ("triton", "reference"))
    assert_kernel_accurate(kernel, reference, tensors, dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("swin", torch.float32), ("v2", torch.float32), ("v2", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("cut", CUTS)
def test_cuts(cut, kind, dtype):
    assert_accurate(CUTS[cut], kind, dtype)


@pytest.mark.parametrize(
    ("cut", "dtype"), [*(("3x5-padded", dtype) for dtype in KERNEL_DTYPES), ("9x9", torch.float32)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(cut, kind, dtype):
    assert_accurate(CUTS[cut], kind, dtype)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("cut", ["4x4", "9x9"])
def test_batches(cut, batch):
    assert_accurate(CUTS[cut], "v2", torch.float32, batch=batch)


@pytest.mark.parametrize(("cut", "programs"), [("4x4-shifted", 1), ("4x4-shifted", 9), ("3x5", 6), ("9x9", 12)])
def test_a_program_goes_through_windows(cut, programs):
    """As many as there are a program, and as do not divide by their number."""
    with mock.patch("mae_kernels.kernels._windows.num_programs", return_value=programs):
        assert_accurate(CUTS[cut], "v2", torch.float32, batch=2)


@st.composite
def cuts(draw: st.DrawFn) -> tuple:
    grid, window = (tuple(draw(st.integers(1, most)) for _ in range(2)) for most in (9, 5))
    shift = tuple(draw(st.integers(0, size - 1)) for size in padded_grid(grid, window))
    return grid, window, shift, draw(st.integers(1, 2)), draw(st.integers(1, 5))


@settings(deadline=None, max_examples=20)
@given(cut=cuts(), batch=st.integers(1, 2))
def test_any_cut(cut, batch):
    tensors, options = arguments(cut, "v2", batch=batch)
    results, expected = (
        with_gradients(partial(window_attention, **options, impl=impl), tensors) for impl in ("triton", "reference")
    )
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # 1 / eps is beyond float16
@pytest.mark.parametrize("cut", ["4x4-shifted", "9x9"])
def test_vectors_of_zeros(cut, dtype):
    """Some queries, some keys, and all of a sample: no gradient is NaN."""
    tensors, options = arguments(CUTS[cut], "v2", batch=2)
    q, k, _ = tensors["qkv"].chunk(3, dim=-1)
    q[0, ::3] = 0
    k[0, 1::4] = 0
    q[1] = k[1] = 0
    kernel, reference = (partial(window_attention, **options, impl=impl) for impl in ("triton", "reference"))
    assert_kernel_accurate(kernel, reference, tensors, dtype)


def test_logits_far_apart():
    """Beyond what exp can hold, with a bias that reaches across the seam and would into the padding."""
    tensors, options = arguments(CUTS["3x5-padded"], "swin")
    tensors["bias"] *= 300
    kernel, reference = (partial(window_attention, **options, impl=impl) for impl in ("triton", "reference"))
    assert_kernel_accurate(kernel, reference, tensors, torch.float32)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("trained", [{"qkv"}, {"bias"}, {"scale"}, {"qkv", "bias"}, set()], ids=str)
def test_only_what_is_asked_for(trained, impl):
    tensors, options = arguments(CUTS["3x5-padded"], "v2")
    run = partial(window_attention, **options, impl=impl)
    expected = with_gradients(run, tensors)
    leaves = {name: tensor.clone().requires_grad_(name in trained) for name, tensor in tensors.items()}
    out = run(**leaves)
    torch.testing.assert_close(out.detach(), expected["output 0"], rtol=0, atol=0)
    assert out.requires_grad == bool(trained)
    if trained:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        out.backward(upstream.to(out))
    for name, leaf in leaves.items():
        if name in trained:
            torch.testing.assert_close(leaf.grad, expected[f"gradient of {name}"], rtol=0, atol=0)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_saves_its_arguments_alone(impl):
    tensors, options = arguments(CUTS["4x4-shifted"], "v2")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()), lambda _: None):
        window_attention(**leaves, **options, impl=impl)
    assert set(saved) == {leaf.data_ptr() for leaf in leaves.values()}


@pytest.mark.parametrize(("window", "dim"), [((17, 16), 4), ((16, 16), 65), ((8, 16), 129)])
def test_windows_that_fit_no_tile(window, dim):
    """Are refused where Triton is asked for, and take the torch form where it is not."""
    qkv = torch.zeros(1, window[0] * window[1], 3 * dim, device=KERNEL_DEVICE)
    call = partial(window_attention, qkv, num_heads=1, grid=window, window=window)
    expected = (
        rf"^window_attention: impl is 'triton' for windows of {window[0] * window[1]} tokens and heads of {dim}, "
    )
    with pytest.raises(ValueError, match=expected):
        call(impl="triton")
    with mock.patch("mae_kernels.ops.window_attention.select", return_value=lambda *_: None) as select:
        call()
    assert select.call_args.args[2] == "torch"
