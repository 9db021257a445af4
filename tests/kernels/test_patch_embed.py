from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mae_kernels import patch_embed
from mae_kernels.patches import gather_patches, scatter_patches
from torch import Tensor

from .calls import CALLS, KERNEL_DEVICE, shuffled_rows, torch_forms
from .tolerance import assert_kernel_accurate, assert_same_function, with_gradients

# Clips, kept patches, image (C, H, W), weight (D, C, ph, pw) and stride of each case.
SHAPES = {
    "square": (2, 3, (1, 8, 8), (6, 1, 4, 4), None),
    "all-kept": (2, 8, (1, 6, 8), (5, 1, 3, 2), None),
    "rectangular": (3, 4, (2, 6, 15), (7, 2, 2, 5), None),
    "overlap": (2, 7, (3, 11, 7), (5, 3, 4, 3), (1, 2)),
    "margin": (2, 3, (2, 11, 13), (4, 2, 3, 5), None),
    "one-patch": (1, 1, (3, 5, 4), (3, 3, 5, 4), None),
    "one-value": (2, 5, (1, 3, 2), (3, 1, 1, 1), None),
    "no-clips": (0, 3, (1, 8, 8), (6, 1, 4, 4), None),
    "nothing-kept": (2, 0, (1, 8, 8), (6, 1, 4, 4), None),
}
# More of the same, around the sizes of the kernels' tiles: 64 rows, 64 or 128 of D, 64 values of a patch, or 256.
KERNEL_SHAPES = SHAPES | {
    "primes": (3, 11, (3, 23, 19), (13, 3, 5, 3), (3, 2)),
    "one-short": (7, 8, (1, 36, 14), (63, 1, 9, 7), None),
    "one-more": (5, 13, (1, 26, 30), (129, 1, 13, 5), None),
    "two-channels-of-a-tile": (2, 5, (2, 24, 16), (16, 2, 8, 8), (4, 8)),
    "more-than-a-tile-of-values": (2, 3, (3, 33, 22), (5, 3, 11, 11), None),
    "only-the-class-token": (3, 0, (1, 6, 8), (5, 1, 3, 2), None),
}
PARTS = {
    "bare": (),
    "bias": ("bias",),
    "position": ("bias", "position"),
    "cls": ("bias", "cls_token"),
    "cls-position": ("bias", "position", "cls_token"),
    "cls-all-positions": ("bias", "position_with_cls", "cls_token"),
}


def embed_one_by_one(
    image: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    cls_token: Tensor | None = None,
    *,
    stride: tuple[int, int],
) -> Tensor:
    """Each kept patch cut out by hand, times the weights, plus bias and its row of the position table."""
    batch, kept = ids_keep.shape
    dim, _, *patch = weight.shape
    height, width = ((size - side) // step + 1 for size, side, step in zip(image.shape[2:], patch, stride, strict=True))
    first = int(cls_token is not None)
    out = image.new_zeros(batch, first + kept, dim)
    for b in range(batch):
        if cls_token is not None:
            out[b, 0] = cls_token.flatten()
            if position is not None and position.shape[0] == height * width + 1:
                out[b, 0] = cls_token.flatten() + position[0]
        for k, token in enumerate(ids_keep[b].tolist()):
            row, column = token // width * stride[0], token % width * stride[1]
            cut = image[b, :, row : row + patch[0], column : column + patch[1]]
            out[b, first + k] = (weight * cut).sum(dim=(1, 2, 3))
            if bias is not None:
                out[b, first + k] += bias
            if position is not None:
                out[b, first + k] += position[token - height * width]
    return out


def arguments(shape: str, parts: str) -> tuple[dict[str, Any], tuple[int, int]]:
    batch, kept, image_shape, weight_shape, stride = KERNEL_SHAPES[shape]
    patch = weight_shape[2:]
    stride = stride or patch
    rows, columns = ((size - side) // step + 1 for size, side, step in zip(image_shape[1:], patch, stride, strict=True))
    length, dim = rows * columns, weight_shape[0]
    optional = {
        "bias": (dim,),
        "position": (length, dim),
        "position_with_cls": (1 + length, dim),
        "cls_token": (1, 1, dim),
    }
    generator = torch.Generator().manual_seed(0)
    shapes = {"image": (batch, *image_shape), "weight": weight_shape} | {name: optional[name] for name in PARTS[parts]}
    tensors = {
        name.removesuffix("_with_cls"): torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return tensors | {"ids_keep": shuffled_rows(batch, length)[:, :kept]}, stride


@pytest.mark.parametrize("impl", torch_forms("patch_embed"))
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_patches_one_by_one(shape, parts, impl):
    tensors, stride = arguments(shape, parts)
    assert_same_function(
        lambda **tensors: patch_embed(**tensors, stride=stride, impl=impl),
        lambda **tensors: embed_one_by_one(**tensors, stride=stride),
        tensors,
    )


def test_the_stride_is_the_patch_size_by_default_and_may_be_one_int():
    tensors, _ = arguments("square", "bias")
    expected = patch_embed(**tensors, stride=(4, 4))
    torch.testing.assert_close(patch_embed(**tensors), expected, rtol=0, atol=0)
    torch.testing.assert_close(patch_embed(**tensors, stride=4), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)])
def test_a_class_token_may_have_any_shape(shape):
    call = CALLS["patch_embed"]
    torch.testing.assert_close(call(cls_token=call.tensors["cls_token"].view(shape)), call(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(3, 13, 7)}, r"image has shape \(3, 13, 7\), expected \(B, C, H, W\)"),
        ({"ids_keep": torch.zeros(3, 4).long()}, r"ids_keep has shape \(3, 4\), expected \(B, K\) with B = 2"),
        ({"ids_keep": torch.zeros(4).long()}, r"ids_keep has shape \(4,\), expected \(B, K\) with B = 2"),
        (
            {"weight": torch.zeros(8, 1, 4, 3)},
            r"weight has shape \(8, 1, 4, 3\), expected \(D, C, ph, pw\) with C = 3",
        ),
        ({"bias": torch.zeros(7)}, r"bias has shape \(7,\), expected \(D\) with D = 8"),
        ({"position": torch.zeros(17, 8)}, r"position has shape \(17, 8\), expected \(15, 8\) or \(16, 8\)"),
        ({"position": torch.zeros(1, 16, 8)}, r"position has shape \(1, 16, 8\), expected \(15, 8\) or \(16, 8\)"),
        ({"position": torch.zeros(15, 4)}, r"position has shape \(15, 4\), expected \(15, 8\) or \(16, 8\)"),
        ({"cls_token": None}, r"position has shape \(16, 8\), expected \(15, 8\)"),
        ({"cls_token": torch.zeros(1, 1, 7)}, r"cls_token has shape \(1, 1, 7\), expected D = 8 values"),
        ({"stride": (5, 2)}, r"stride is \(5, 2\), expected at most the patch size \(4, 3\)"),
        ({"stride": (0, 2)}, r"stride is \(0, 2\), expected one or two ints of at least 1"),
        ({"stride": (2, 2, 2)}, r"stride is \(2, 2, 2\), expected one or two ints of at least 1"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^patch_embed: {message}$"):
        CALLS["patch_embed"](**changes)


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match=r"an image of \(3, 7\) is smaller than one patch of \(4, 3\)$"):
        CALLS["patch_embed"](image=torch.zeros(2, 3, 3, 7))


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"^patch_embed: bias is a list, expected a tensor \(D\)$"):
        CALLS["patch_embed"](bias=[0.0] * 8)


def on_device(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(KERNEL_DEVICE, dtype if t.is_floating_point() else None) for name, t in tensors.items()}


def assert_kernels_accurate(tensors: dict[str, Tensor], stride: tuple[int, int], dtype: torch.dtype) -> None:
    kernel, reference = (partial(patch_embed, stride=stride, impl=impl) for impl in ("triton", "reference"))
    assert_kernel_accurate(kernel, reference, on_device(tensors, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernels_at_awkward_shapes(shape, dtype):
    tensors, stride = arguments(shape, "cls-all-positions")
    assert_kernels_accurate(tensors, stride, dtype)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shape", ["primes", "more-than-a-tile-of-values", "nothing-kept"])
def test_kernels_with_every_set_of_parts(shape, parts):
    tensors, stride = arguments(shape, parts)
    assert_kernels_accurate(tensors, stride, torch.bfloat16)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_kernels_find_any_patch(data):
    draw = data.draw
    channels, batch, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    patch, stride, size = [], [], []
    for _ in range(2):
        patch.append(draw(st.integers(1, 9)))
        stride.append(draw(st.integers(1, patch[-1])))
        margin = draw(st.integers(0, stride[-1] - 1))
        size.append(patch[-1] + stride[-1] * draw(st.integers(0, 5)) + margin)
    length = ((size[0] - patch[0]) // stride[0] + 1) * ((size[1] - patch[1]) // stride[1] + 1)
    ids = draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=8 * batch))
    kept = len(ids) // batch
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "image": torch.randn(batch, channels, *size, generator=generator),
        "ids_keep": torch.tensor(ids[: batch * kept]).view(batch, kept),  # some patches more than once
        "weight": torch.randn(dim, channels, *patch, generator=generator),
        "position": torch.randn(length, dim, generator=generator),
    }
    assert_kernels_accurate(tensors, (stride[0], stride[1]), torch.float32)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    "trained",
    [
        {"weight", "bias", "cls_token"},
        {"bias", "cls_token"},
        {"weight"},
        {"position"},
        {"image"},
        {"cls_token"},
        set(),
    ],
    ids=lambda names: "-".join(sorted(names)) or "nothing",
)
def test_gradients_only_of_what_requires_them(trained, impl):
    tensors, stride = arguments("overlap", "cls-all-positions")
    gradients = {}
    for form in (impl, "reference"):
        leaves = on_device(tensors, torch.float32)
        for name in trained:
            leaves[name].requires_grad_()
        tokens = patch_embed(**leaves, stride=stride, impl=form)
        assert tokens.requires_grad == bool(trained)
        if trained:
            tokens.square().sum().backward()
        gradients[form] = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients[impl].keys() == trained
    torch.testing.assert_close(gradients[impl], gradients["reference"], rtol=1e-4, atol=1e-4)


def test_a_frozen_weight_costs_no_product(monkeypatch):
    import mae_kernels.kernels.patch_embed as kernels

    monkeypatch.delattr(kernels, "patch_embed_backward")
    tensors, stride = arguments("overlap", "cls-all-positions")
    leaves = {
        n: t.requires_grad_(n not in ("weight", "ids_keep")) for n, t in on_device(tensors, torch.float32).items()
    }
    patch_embed(**leaves, stride=stride, impl="triton").sum().backward()
    assert leaves["bias"].grad is not None
    leaves["weight"].requires_grad_()
    with pytest.raises(NameError, match="patch_embed_backward"):
        patch_embed(**leaves, stride=stride, impl="triton").sum().backward()


def test_a_view_of_an_image_is_read_where_it_is():
    tensors, stride = arguments("primes", "bias")
    tensors = on_device(tensors, torch.float32)
    _, channels, height, width = tensors["image"].shape
    larger = torch.randn(5, channels + 2, height + 3, width + 4, device=KERNEL_DEVICE)
    view = larger[::2, 1:-1, 2:-1, 3:-1]
    assert view.shape == tensors["image"].shape
    embed = partial(patch_embed, **tensors | {"image": view}, stride=stride)
    torch.testing.assert_close(embed(impl="triton"), embed(impl="triton", image=view.contiguous()), rtol=0, atol=0)
    torch.testing.assert_close(embed(impl="triton"), embed(impl="reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", PARTS)
def test_gradients_of_the_torch_form_are_those_of_its_differences(parts):
    tensors, stride = arguments("overlap", parts)
    ids_keep = tensors.pop("ids_keep")
    names = list(tensors)

    def embed(*values):
        return patch_embed(ids_keep=ids_keep, stride=stride, impl="torch", **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(embed, [tensor.requires_grad_() for tensor in tensors.values()], fast_mode=True)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("added", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtypes_of_the_reference(added, parts, impl):
    tensors, stride = arguments("overlap", parts)
    tensors = {
        name: t.to(added) if name in ("position", "cls_token") else t
        for name, t in on_device(tensors, torch.float32).items()
    }
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        results, published = (
            with_gradients(partial(patch_embed, stride=stride, impl=form), tensors) for form in (impl, "reference")
        )
    assert {what: t.dtype for what, t in results.items()} == {what: t.dtype for what, t in published.items()}


@pytest.mark.parametrize("argument", ["weight", "bias"])
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_a_product_of_two_dtypes_is_refused(argument, impl):
    call = CALLS["patch_embed"].to(torch.float32).on(KERNEL_DEVICE)
    other = {argument: call.tensors[argument].bfloat16()}
    message = rf"^patch_embed: {argument} has dtype torch.bfloat16, expected torch.float32, that of image$"
    with pytest.raises(TypeError, match=message):
        call(**other, impl=impl)
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        assert call(**other, impl=impl).dtype == torch.float32


def test_compiles_for_any_size():
    torch.compiler.reset()
    compiled = torch.compile(partial(patch_embed, impl="triton"), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, kept, height in [(2, 3, 8), (3, 5, 12)]:
        ids_keep = shuffled_rows(batch, height // 2)[:, :kept].to(KERNEL_DEVICE)
        image, weight, bias = (
            torch.randn(shape, device=KERNEL_DEVICE) for shape in [(batch, 2, height, 8), (6, 2, 4, 4), (6,)]
        )
        tensors = {"image": image, "ids_keep": ids_keep, "weight": weight, "bias": bias}
        torch.testing.assert_close(
            with_gradients(compiled, tensors), with_gradients(partial(patch_embed, impl="triton"), tensors)
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_patches_are_scattered_by_the_adjoint_of_their_gathering(shape):
    tensors, stride = arguments(shape, "bare")
    image, ids, size = tensors["image"], tensors["ids_keep"], tuple(tensors["image"].shape[2:])
    ids = torch.cat([ids, ids], dim=1)  # so that patches are added to each other even without an overlap
    gathered = gather_patches(image, ids, tuple(tensors["weight"].shape[2:]), stride)
    patches = torch.randn_like(gathered)
    scattered = scatter_patches(patches, ids, size, stride)
    assert scattered.shape == image.shape
    torch.testing.assert_close((gathered * patches).sum(), (image * scattered).sum())
