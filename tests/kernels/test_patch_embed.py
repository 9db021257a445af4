from typing import Any

import pytest
import torch
from mae_kernels import patch_embed
from torch import Tensor

from .calls import CALLS, shuffled_rows, torch_forms
from .tolerance import assert_same_function

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
    batch, kept, image_shape, weight_shape, stride = SHAPES[shape]
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
