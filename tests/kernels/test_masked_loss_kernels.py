"""The kernels of ``masked_mse`` and ``linear_masked_mse`` where their tiles, sums and shortcuts could go wrong."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mae_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .calls import KERNEL_DEVICE, KERNEL_DTYPES, Call, shuffled_rows
from .tolerance import assert_accurate, assert_kernel_accurate, with_gradients

OPERATORS = ["masked_mse", "linear_masked_mse"]

# Clips, removed patches, image (C, H, W), patch, stride, width of hidden.
SHAPES = {
    "one-patch": (1, 1, (3, 5, 4), (5, 4), None, 7),
    "primes": (5, 7, (1, 51, 5), (3, 5), None, 13),
    "one-short-of-a-block": (1, 127, (1, 64, 32), (4, 4), None, 31),
    "a-block-and-one": (3, 43, (1, 90, 9), (2, 9), None, 65),
    "all-removed": (2, 4, (1, 6, 4), (3, 2), None, 16),
    "overlap-and-margin": (2, 11, (3, 13, 7), (4, 3), (2, 2), 24),
    "skipped-values": (2, 5, (2, 14, 9), (2, 3), (5, 4), 8),
    "patch-of-two-tiles": (2, 3, (1, 39, 20), (13, 10), None, 40),
    "patch-of-many-tiles": (2, 2, (3, 30, 10), (10, 10), None, 129),
}


def call(operator: str, shape: str, offset: float = 0.0, **options: Any) -> Call:
    batch, removed, image, patch_size, stride, dim = SHAPES[shape]
    length = 1
    for size, patch, step in zip(image[1:], patch_size, stride or patch_size, strict=True):
        length *= (size - patch) // step + 1
    values = image[0] * patch_size[0] * patch_size[1]
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"pred": (batch, length, values)}
    if operator == "linear_masked_mse":
        shapes = {"hidden": (batch, length, dim), "weight": (values, dim), "bias": (values,)}
    shapes["image"] = (batch, *image)
    tensors = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    tensors["image"] += offset
    tensors["ids_removed"] = shuffled_rows(batch, length)[:, :removed]
    return Call(operator, tensors, {"patch_size": patch_size, "stride": stride, **options}).on(KERNEL_DEVICE)


def assert_accurate_call(made: Call, dtype: torch.dtype) -> None:
    assert_kernel_accurate(partial(made, impl="triton"), partial(made, impl="reference"), made.tensors, dtype)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_awkward_shapes(operator, shape, dtype):
    assert_accurate_call(call(operator, shape), dtype)


@pytest.mark.parametrize("options", [{"normalize": False}, {"eps": 0.5}], ids=str)
@pytest.mark.parametrize("shape", ["primes", "patch-of-many-tiles"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_options(operator, shape, options):
    assert_accurate_call(call(operator, shape, **options), torch.float32)


@pytest.mark.parametrize("shape", ["primes", "patch-of-many-tiles"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_patches_far_from_zero(operator, shape):
    """Sums of squares about zero would lose all digits of a variance of 1 at a mean of 1e4."""
    assert_accurate_call(call(operator, shape, offset=1e4), torch.float32)


def test_a_head_without_bias():
    made = call("linear_masked_mse", "primes", bias=None)
    del made.tensors["bias"]
    assert_accurate_call(made, torch.float32)


@pytest.mark.parametrize("shape", ["primes", "patch-of-many-tiles"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_constant_patch_has_a_target_of_exactly_zero(operator, shape):
    """Its deviation is the root of eps, which would make 1000 of any rounding error of its mean."""
    made = call(operator, shape).to(torch.float32)
    tensors = made.tensors
    constant = torch.full_like(tensors["image"], 1000.1)
    pred = tensors["pred"] if operator == "masked_mse" else tensors["hidden"] @ tensors["weight"].T + tensors["bias"]
    rows = pred.gather(1, tensors["ids_removed"][:, :, None].expand(-1, -1, pred.shape[2]))
    torch.testing.assert_close(made(image=constant, impl="triton"), rows.square().mean(), rtol=1e-6, atol=0)


@st.composite
def integer_calls(draw: st.DrawFn, operator: str) -> Call:
    """Whole numbers in any geometry: small enough for sums to be exact, and far apart where one is misplaced."""
    batch, channels, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    patch_size, stride = ((draw(st.integers(1, 6)), draw(st.integers(1, 6))) for _ in range(2))
    grid = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    sizes = zip(grid, stride, patch_size, strict=True)
    height, width = ((n - 1) * step + patch + draw(st.integers(0, step - 1)) for n, step, patch in sizes)
    values, length = channels * patch_size[0] * patch_size[1], grid[0] * grid[1]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shapes: dict[str, tuple[int, ...]] = {"pred": (batch, length, values)}
    if operator == "linear_masked_mse":
        shapes = {"hidden": (batch, length, dim), "weight": (values, dim), "bias": (values,)}
    shapes["image"] = (batch, channels, height, width)
    tensors = {name: torch.randint(-4, 5, s, generator=generator).float() for name, s in shapes.items()}
    removed = draw(st.integers(1, length))
    tensors["ids_removed"] = shuffled_rows(batch, length, seed=draw(st.integers(0, 2**16)))[:, :removed]
    options = {"patch_size": patch_size, "stride": stride, "normalize": False}
    return Call(operator, tensors, options).on(KERNEL_DEVICE)


@pytest.mark.parametrize("operator", OPERATORS)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_every_value_meets_its_own(operator, data):
    assert_accurate_call(data.draw(integer_calls(operator)), torch.float32)


def gradients(made: Call, wanted: set[str], upstream: float = 1.0) -> dict[str, Tensor]:
    """Loss and gradients of the Triton form, where only ``wanted`` require one."""
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in made.tensors.items()}
    loss = made(**leaves, impl="triton")
    inputs = [leaves[name] for name in sorted(wanted)]
    found = torch.autograd.grad(loss, inputs, torch.tensor(upstream, device=KERNEL_DEVICE))
    return {"loss": loss.detach()} | dict(zip(sorted(wanted), found, strict=True))


@pytest.mark.parametrize(
    ("operator", "wanted"),
    [("masked_mse", {"pred"}), ("masked_mse", {"image"})]
    + [("linear_masked_mse", {name}) for name in ("hidden", "weight", "bias", "image")]
    + [("linear_masked_mse", {"hidden", "weight", "bias"})],
    ids=str,
)
def test_what_is_frozen_changes_no_other_gradient(operator, wanted):
    made = call(operator, "primes").to(torch.float32)
    everything = gradients(made, {name for name, t in made.tensors.items() if t.is_floating_point()})
    some = gradients(made, wanted)
    torch.testing.assert_close(some, {name: everything[name] for name in some}, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_loss_alone_is_the_same(operator, dtype):
    """Without gradients it may be computed in other tiles."""
    made = call(operator, "patch-of-two-tiles").to(dtype)
    loss = gradients(made, set(made.tensors) & {"pred", "hidden"})["loss"]
    with torch.no_grad():
        torch.testing.assert_close(made(impl="triton"), loss, rtol=1e-6, atol=0)


def kept(function: Callable[[], Tensor]) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert function().requires_grad
    return saved


@pytest.mark.parametrize(
    ("operator", "wanted", "keeps_residuals"),
    [
        ("masked_mse", {"pred"}, True),
        ("linear_masked_mse", {"hidden", "weight", "bias"}, True),
        ("linear_masked_mse", {"weight", "bias"}, False),
    ],
    ids=str,
)
def test_of_what_is_large_only_the_residuals_of_removed_patches_are_kept(operator, wanted, keeps_residuals):
    made = call(operator, "a-block-and-one").to(torch.bfloat16)
    leaves = {name: t.requires_grad_(name in wanted) for name, t in made.tensors.items()}
    batch, removed, image, patch_size, _, dim = SHAPES["a-block-and-one"]
    values = image[0] * patch_size[0] * patch_size[1]
    small = {(batch, 45), (values, dim), (values,)}
    saved = [t for t in kept(lambda: made(**leaves, impl="triton")) if tuple(t.shape) not in small]
    residuals = [((batch, removed, values), torch.bfloat16)] if keeps_residuals else []
    assert [(tuple(t.shape), t.dtype) for t in saved] == residuals


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_gradient_of_the_image_for_predictions_far_off(operator):
    """Normalisation takes the mean out of it, which is most of the residuals here."""
    made = call(operator, "primes")
    made.tensors["pred" if operator == "masked_mse" else "bias"] += 1000
    made = made.to(torch.bfloat16)
    image = made.tensors["image"].double().requires_grad_()
    (truth,) = torch.autograd.grad(made.to(torch.float64)(image=image, impl="reference"), image)
    assert_accurate("gradient of image", gradients(made, {"image"})["image"], truth, torch.bfloat16)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("dtype", "upstream"), [(torch.float32, -(2.0**-100)), (torch.float32, 3.0), (torch.float16, 2.0**15)], ids=str
)
def test_upstream_gradients_of_any_size(operator, dtype, upstream):
    """As loss scaling makes them: 2 / (R P) times a residual would not survive in float16 without it."""
    made = call(operator, "one-short-of-a-block").to(dtype)
    wanted = {name for name, t in made.tensors.items() if t.is_floating_point()}
    results = gradients(made, wanted, upstream)
    leaves = {name: t.double().requires_grad_() for name, t in made.tensors.items() if name in wanted}
    truth = torch.autograd.grad(made(**leaves, impl="reference"), [leaves[name] for name in sorted(wanted)])
    for name, gradient in zip(sorted(wanted), truth, strict=True):
        assert_accurate(name, results[name], gradient * upstream, dtype)


@pytest.mark.parametrize("operator", OPERATORS)
def test_views_are_read_where_they_lie(operator):
    made = call(operator, "overlap-and-margin").to(torch.float32)
    rows = "pred" if operator == "masked_mse" else "hidden"
    tensors, views = made.tensors, {}
    views[rows] = torch.cat([torch.full_like(tensors[rows][:, :1], 1e3), tensors[rows]], dim=1)[:, 1:]
    wide = torch.nn.functional.pad(tensors["image"], (1, 2, 3, 4), value=1e3)
    views["image"] = wide[:, :, 3:-4, 1:-2]
    views["ids_removed"] = tensors["ids_removed"].T.contiguous().T
    for name, view in views.items():
        assert not view.is_contiguous()
        expected = made(impl="triton")
        torch.testing.assert_close(made(**{name: view}, impl="triton"), expected, rtol=0, atol=0)
    channels_last = tensors["image"].to(memory_format=torch.channels_last)
    torch.testing.assert_close(made(image=channels_last, impl="triton"), made(impl="triton"), rtol=0, atol=0)


def test_the_bfloat16_products_of_float32_states():
    """What a LayerNorm gives under autocast is float32, and so is its gradient."""
    made = call("linear_masked_mse", "a-block-and-one")
    truth = with_gradients(made, made.tensors)
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        results = with_gradients(partial(made.to(torch.float32), impl="triton"), made.to(torch.float32).tensors)
    for what, value in truth.items():
        assert results[what].dtype == torch.float32
        assert_accurate(what, results[what], value, torch.bfloat16)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_image_in_float64_is_refused(operator):
    made = call(operator, "all-removed").to(torch.float32)
    image = made.tensors["image"].double()
    with pytest.raises(TypeError, match=rf"^{operator}: impl is 'triton' for torch.float64, expected float32"):
        made(image=image, impl="triton")
    assert made(image=image).dtype == torch.float64


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_for_any_batch(operator):
    torch.compiler.reset()
    made = call(operator, "primes").to(torch.float32)
    function = getattr(mae_kernels, operator)
    compiled = torch.compile(
        lambda **tensors: function(**tensors, **made.options, impl="triton"),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    shared = ("weight", "bias")
    for batch in (5, 3):
        tensors = {name: t if name in shared else t[:batch] for name, t in made.tensors.items()}
        torch.testing.assert_close(
            with_gradients(compiled, tensors),
            with_gradients(partial(made, impl="triton"), tensors),
            rtol=1e-6,
            atol=1e-7,
        )
    torch.compiler.reset()
