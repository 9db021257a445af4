r"""Patch embedding of the visible patches.

.. math:: y_{b,k} = W \, p_{b, i} + \beta + e_i, \qquad i = \mathrm{ids\_keep}_{b,k}

where ``p_{b,i}`` is patch ``i`` of image ``b`` and ``e`` the position embedding; a class token, with its own position
if there is one, is put in front (He et al. 2022, section 3; Huang et al. 2022, section 3.1).

Tensors: ``image (B, C, H, W)``, ``ids_keep (B, K)`` int64, ``weight (D, C, ph, pw)``, ``bias (D,)``, ``position (L,
D)`` or ``(1 + L, D)``, ``cls_token (1, 1, D)``; out ``(B, [1 +] K, D)``. With P = C ph pw and s bytes a value: least
traffic is s (B K P + D P + B K D) bytes and 2 B K P D FLOPs, forward and, to weight and bias, backward again; the
position adds s L D bytes. Projecting all L patches and gathering afterwards, as published code does, costs L / K times
the FLOPs and writes the L tokens twice.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_kernels._autocast import compute_dtype
from mae_kernels._checks import check_devices, check_floating, check_ids, check_shapes, pair
from mae_kernels._forms import select
from mae_kernels._positions import check_position, split_position
from mae_kernels.patches import gather_patches, grid_shape


def prepend_cls(tokens: Tensor, cls_token: Tensor | None, cls_position: Tensor | None) -> Tensor:
    """Put a class token, with its position ``(1, D)`` if it has one, in front of ``tokens (B, K, D)``."""
    if cls_token is None:
        return tokens
    cls_token = cls_token.reshape(1, -1)
    if cls_position is not None:
        cls_token = cls_token + cls_position
    return torch.cat([cls_token.expand(tokens.shape[0], 1, -1), tokens], dim=1)


def reference(
    image: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    cls_token: Tensor | None,
    stride: tuple[int, int],
) -> Tensor:
    """Project every patch by a convolution, add positions, then gather, as published code does."""
    tokens = F.conv2d(image, weight, bias, stride=stride).flatten(2).transpose(1, 2)
    cls_position, position = split_position(position, tokens.shape[1])
    if position is not None:
        tokens = tokens + position
    tokens = tokens.gather(1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]))
    return prepend_cls(tokens, cls_token, cls_position)


def visible(
    image: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    cls_token: Tensor | None,
    stride: tuple[int, int],
) -> Tensor:
    """Gather the visible patches, then project them alone."""
    patches = gather_patches(image, ids_keep, (weight.shape[2], weight.shape[3]), stride)
    tokens = F.linear(patches.flatten(2), weight.flatten(1), bias)
    rows, columns = grid_shape((image.shape[2], image.shape[3]), (weight.shape[2], weight.shape[3]), stride)
    cls_position, position = split_position(position, rows * columns)
    if position is not None:
        tokens = tokens + position[ids_keep]
    return prepend_cls(tokens, cls_token, cls_position)


def triton(
    image: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    cls_token: Tensor | None,
    stride: tuple[int, int],
) -> Tensor:
    """Read the visible patches where they are, and write their tokens once."""
    from mae_kernels.kernels.patch_embed import patch_embed

    return patch_embed(image, ids_keep, weight, bias, position, cls_token, stride)


FORMS = {"reference": reference, "torch": visible, "triton": triton}


def _check_product(image: Tensor, **arguments: Tensor | None) -> None:
    """Raise TypeError unless a product of the image with ``arguments`` has one dtype, as under autocast."""
    expected = compute_dtype(image.device.type, image.dtype)
    for name, tensor in arguments.items():
        if tensor is not None and compute_dtype(tensor.device.type, tensor.dtype) != expected:
            raise TypeError(f"patch_embed: {name} has dtype {tensor.dtype}, expected {image.dtype}, that of image")


def patch_embed(
    image: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    cls_token: Tensor | None = None,
    *,
    stride: int | Sequence[int] | None = None,
    check: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Embed the kept patches of an image.

    Args:
        image: ``(B, C, H, W)``.
        ids_keep: ``(B, K)`` int64 patch ids, row-major over the patch grid.
        weight: ``(D, C, ph, pw)``, as a convolution's.
        bias: ``(D,)``.
        position: ``(L, D)``, or ``(1 + L, D)`` with that of the class token first.
        cls_token: ``D`` values of any shape, ``(1, 1, D)`` in MAE; put in front of the patches.
        stride: Step between patches, at most the patch size; by default the patch size. Below it, patches overlap.
        check: Range-check the ids, which waits for the device.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        Tokens ``(B, [1 +] K, D)``.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, device, stride or (with ``check``) id.
    """
    sizes = check_shapes(
        "patch_embed",
        image=(image, "B C H W"),
        ids_keep=(ids_keep, "B K"),
        weight=(weight, "D C ph pw"),
        bias=(bias, "? D"),
    )
    floating = {"image": image, "weight": weight, "bias": bias, "position": position, "cls_token": cls_token}
    check_floating("patch_embed", **floating)
    dim, patch_size = sizes["D"], (sizes["ph"], sizes["pw"])
    stride = patch_size if stride is None else pair("patch_embed", "stride", stride, minimum=1)
    if stride[0] > patch_size[0] or stride[1] > patch_size[1]:
        raise ValueError(f"patch_embed: stride is {stride}, expected at most the patch size {patch_size}")
    rows, columns = grid_shape((sizes["H"], sizes["W"]), patch_size, stride)
    length = rows * columns
    check_position("patch_embed", position, length, dim, has_cls=cls_token is not None)
    if cls_token is not None and cls_token.numel() != dim:
        raise ValueError(f"patch_embed: cls_token has shape {tuple(cls_token.shape)}, expected D = {dim} values")
    check_devices("patch_embed", **floating, ids_keep=ids_keep)
    _check_product(image, weight=weight, bias=bias)
    check_ids("patch_embed", "ids_keep", ids_keep, length, values=check)
    return select("patch_embed", FORMS, impl, image)(image, ids_keep, weight, bias, position, cls_token, stride)
