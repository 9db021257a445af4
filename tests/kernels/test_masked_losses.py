"""The loss from predictions (``masked_mse``) and from hidden states (``linear_masked_mse``)."""

from typing import Any

import pytest
import torch
from mae_kernels import linear_masked_mse, masked_mse
from mae_kernels._targets import image_gradient, removed_targets
from torch import Tensor

from .calls import CALLS, shuffled_rows, torch_forms
from .tolerance import assert_accurate, assert_same_function

# Clips, removed patches, image (C, H, W), patch and stride of each case.
SHAPES = {
    "square": (2, 3, (1, 8, 8), (4, 4), None),
    "rectangular": (3, 5, (2, 6, 15), (2, 5), None),
    "overlap": (2, 11, (3, 11, 7), (4, 3), (1, 2)),
    "margin": (2, 3, (2, 11, 13), (3, 5), None),
    "one-patch": (1, 1, (3, 5, 4), (5, 4), None),
    "all-removed": (2, 4, (1, 6, 4), (3, 2), None),
}


def score_one_by_one(
    pred: Tensor,
    image: Tensor,
    ids_removed: Tensor,
    *,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
    eps: float,
) -> Tensor:
    columns = (image.shape[3] - patch_size[1]) // stride[1] + 1
    errors: list[Tensor] = []
    for b, row in enumerate(ids_removed.tolist()):
        for token in row:
            top, left = token // columns * stride[0], token % columns * stride[1]
            target = image[b, :, top : top + patch_size[0], left : left + patch_size[1]].permute(1, 2, 0).flatten()
            if normalize:
                centred = target - target.sum() / len(target)
                target = centred / (centred.square().sum() / (len(target) - 1) + eps).sqrt()
            errors.extend((pred[b, token] - target) ** 2)
    return torch.stack(errors).mean()


def arguments(shape: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    batch, removed, image_shape, patch_size, stride = SHAPES[shape]
    stride = stride or patch_size
    rows, columns = ((n - p) // s + 1 for n, p, s in zip(image_shape[1:], patch_size, stride, strict=True))
    length, values = rows * columns, image_shape[0] * patch_size[0] * patch_size[1]
    generator = torch.Generator().manual_seed(0)
    shapes = {"pred": (batch, length, values), "image": (batch, *image_shape)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["ids_removed"] = shuffled_rows(batch, length)[:, :removed]
    return tensors, {"patch_size": patch_size, "stride": stride}


@pytest.mark.parametrize("impl", torch_forms("masked_mse"))
@pytest.mark.parametrize(("normalize", "eps"), [(True, 1e-6), (True, 0.5), (False, 1e-6)])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_mse_equals_patches_one_by_one(shape, normalize, eps, impl):
    tensors, sizes = arguments(shape)
    options = sizes | {"normalize": normalize, "eps": eps}
    assert_same_function(
        lambda **tensors: masked_mse(**tensors, **options, impl=impl),
        lambda **tensors: score_one_by_one(**tensors, **options),
        tensors,
    )


@pytest.mark.parametrize("impl", torch_forms("linear_masked_mse"))
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_masked_mse_equals_patches_one_by_one(shape, has_bias, normalize, impl):
    tensors, sizes = arguments(shape)
    options = sizes | {"normalize": normalize, "eps": 1e-6}
    batch, length, values = tensors.pop("pred").shape
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden": (batch, length, 7), "weight": (values, 7)} | ({"bias": (values,)} if has_bias else {})
    tensors |= {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}

    def truth(hidden: Tensor, weight: Tensor, bias: Tensor | float = 0.0, **rest: Any) -> Tensor:
        return score_one_by_one(hidden @ weight.T + bias, **rest, **options)

    assert_same_function(
        lambda bias=None, **tensors: linear_masked_mse(bias=bias, **tensors, **options, impl=impl), truth, tensors
    )


@pytest.mark.parametrize(
    ("operator", "impl", "rows"),
    [
        (operator, impl, rows)
        for operator, rows in (("masked_mse", "pred"), ("linear_masked_mse", "hidden"))
        for impl in torch_forms(operator)
    ],
)
def test_visible_patches_do_not_count(operator, impl, rows):
    call = CALLS[operator]
    visible = torch.ones(2, 15, dtype=torch.bool).scatter(1, call.tensors["ids_removed"], False)
    changed = call.tensors[rows].clone()
    changed[visible] = 1e3
    changed.requires_grad_()
    loss = call(**{rows: changed}, impl=impl)
    torch.testing.assert_close(loss, call(impl=impl), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, changed)
    assert not gradient[visible].any()
    assert gradient[~visible].any(dim=-1).all()


@pytest.mark.parametrize("operator", ["masked_mse", "linear_masked_mse"])
def test_the_torch_form_passes_gradcheck(operator):
    call = CALLS[operator]
    leaves = {name: t.clone().requires_grad_() for name, t in call.tensors.items() if t.is_floating_point()}
    assert torch.autograd.gradcheck(
        lambda *values: call(**dict(zip(leaves, values, strict=True)), impl="torch"), tuple(leaves.values())
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_the_image_in_closed_form_is_that_of_autograd(shape, normalize):
    tensors, sizes = arguments(shape)
    image, geometry = tensors["image"].requires_grad_(), (tensors["ids_removed"], *sizes.values(), normalize, 0.1)
    targets = removed_targets(image, *geometry)
    d_targets = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected,) = torch.autograd.grad(targets, image, d_targets)
    torch.testing.assert_close(image_gradient(d_targets, image, *geometry), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", torch_forms("masked_mse"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_computed_in_float32(dtype, impl):
    """Many values, whose sum a low precision could not hold."""
    generator = torch.Generator().manual_seed(0)
    image, pred = (torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 1, 64, 64), (4, 16, 256)))
    ids_removed = shuffled_rows(4, 16)[:, :12]
    truth = masked_mse(pred.double(), image.double(), ids_removed, patch_size=16, impl="reference")
    loss = masked_mse(pred, image, ids_removed, patch_size=16, impl=impl)
    assert loss.dtype == torch.float32
    assert_accurate("loss", loss, truth, torch.float32)


@pytest.mark.parametrize("impl", torch_forms("masked_mse"))
def test_a_constant_patch_has_a_target_of_zero(impl):
    image = torch.full((2, 1, 4, 4), -3.25)
    pred = torch.randn(2, 4, 4)
    ids_removed = shuffled_rows(2, 4)
    loss = masked_mse(pred, image, ids_removed, patch_size=2, impl=impl)
    torch.testing.assert_close(loss, pred.square().mean())


@pytest.mark.parametrize("impl", torch_forms("masked_mse"))
def test_predicting_the_mean_costs_the_unbiased_share(impl):
    image = torch.randn(3, 2, 12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = masked_mse(torch.zeros(3, 12, 40).double(), image, shuffled_rows(3, 12)[:, :7], patch_size=(4, 5), impl=impl)
    torch.testing.assert_close(loss.item(), 39 / 40, rtol=1e-5, atol=0)


def test_sizes_may_be_one_int_and_the_stride_is_the_patch_size_by_default():
    call = CALLS["masked_mse"]
    for sizes in ({"patch_size": (3, 3)}, {"patch_size": 3, "stride": 3}, {"patch_size": (3, 3), "stride": (3, 3)}):
        torch.testing.assert_close(call(**sizes), call(), rtol=0, atol=0)


@pytest.mark.parametrize("operator", ["masked_mse", "linear_masked_mse"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(2, 15, 9)}, r"image has shape \(2, 15, 9\), expected \(B, C, H, W\) with B = 2"),
        ({"image": torch.zeros(3, 2, 15, 9)}, r"image has shape \(3, 2, 15, 9\), expected \(B, C, H, W\) with B = 2"),
        (
            {"ids_removed": torch.zeros(3, 11).long()},
            r"ids_removed has shape \(3, 11\), expected \(B, R\) with B = 2",
        ),
        (
            {"ids_removed": torch.zeros(2, 0).long()},
            r"ids_removed has shape \(2, 0\), expected at least one removed patch",
        ),
        (
            {"image": torch.zeros(2, 2, 18, 9)},
            r"15 patches of 18 values are predicted, expected 18 of 18 for an image of \(2, 2, 18, 9\)",
        ),
        (
            {"image": torch.zeros(2, 3, 15, 9)},
            r"15 patches of 18 values are predicted, expected 15 of 27 for an image of \(2, 3, 15, 9\)",
        ),
        (
            {"patch_size": (3, 9)},
            r"15 patches of 18 values are predicted, expected 5 of 54 for an image of \(2, 2, 15, 9\)",
        ),
        (
            {"stride": 2},
            r"15 patches of 18 values are predicted, expected 28 of 18 for an image of \(2, 2, 15, 9\)",
        ),
        ({"patch_size": 0}, r"patch_size is 0, expected one or two ints of at least 1"),
        ({"stride": (3, 0)}, r"stride is \(3, 0\), expected one or two ints of at least 1"),
    ],
)
def test_wrong_arguments_are_refused(operator, changes, message):
    with pytest.raises(ValueError, match=f"^{operator}: {message}$"):
        CALLS[operator](**changes)


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        ("masked_mse", {"pred": torch.zeros(2, 15)}, r"pred has shape \(2, 15\), expected \(B, L, P\)"),
        (
            "linear_masked_mse",
            {"weight": torch.zeros(18, 7)},
            r"weight has shape \(18, 7\), expected \(P, D\) with D = 8",
        ),
        ("linear_masked_mse", {"bias": torch.zeros(7)}, r"bias has shape \(7,\), expected \(P\) with P = 18"),
        ("linear_masked_mse", {"hidden": torch.zeros(15, 8)}, r"hidden has shape \(15, 8\), expected \(B, L, D\)"),
    ],
)
def test_wrong_predictions_are_refused(operator, changes, message):
    with pytest.raises(ValueError, match=f"^{operator}: {message}$"):
        CALLS[operator](**changes)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_head_in_another_dtype_is_refused_unless_autocast_makes_it_one(name):
    call = CALLS["linear_masked_mse"].to(torch.float32)
    rounded = {name: call.tensors[name].bfloat16()}
    expected = rf"^linear_masked_mse: {name} has dtype torch.bfloat16, expected torch.float32, which hidden has$"
    with pytest.raises(TypeError, match=expected):
        call(**rounded)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(**rounded).dtype == torch.float32


@pytest.mark.parametrize("operator", ["masked_mse", "linear_masked_mse"])
def test_a_batch_of_no_clips_is_refused_rather_than_nan(operator):
    call = CALLS[operator]
    rows = {name: t[:0] for name, t in call.tensors.items() if name not in ("weight", "bias")}
    with pytest.raises(ValueError, match=rf"^{operator}: ids_removed has shape \(0, 11\), expected at least one"):
        call(**rows)


@pytest.mark.parametrize("operator", ["masked_mse", "linear_masked_mse"])
def test_an_image_smaller_than_a_patch_is_refused(operator):
    with pytest.raises(ValueError, match=r"an image of \(2, 9\) is smaller than one patch of \(3, 3\)$"):
        CALLS[operator](image=torch.zeros(2, 2, 2, 9))


def test_normalising_patches_of_one_value_is_refused():
    with pytest.raises(ValueError, match=r"^masked_mse: a patch has 1 value, expected at least 2"):
        masked_mse(torch.zeros(1, 4, 1), torch.zeros(1, 1, 2, 2), torch.tensor([[0, 1]]), patch_size=1)
