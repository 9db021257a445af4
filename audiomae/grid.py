"""The patch grid of a spectrogram: patch counts, token order, overlap, patchify and unpatchify."""

from dataclasses import dataclass

from mae_kernels.patches import grid_shape, patchify, unpatchify
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """How a spectrogram of ``spec_size`` is cut into patches.

    Token order is time-major, frequency fastest: patch ``(t, f)`` is token ``t * shape[1] + f``. Within a patch, values
    are ordered time, frequency, channel, as in published MAE code.

    Args:
        spec_size: ``(frames, mel bins)``.
        patch_size: ``(frames, mel bins)`` of a patch.
        patch_stride: Step between patches, at most the patch size; smaller steps overlap. Overlapping patches that do
            not reach the end leave a margin that no patch covers, as a convolution does.

    Raises:
        ValueError: Sizes that are not positive, a patch larger than the spectrogram, a stride larger than the patch, or
            patches without overlap that do not cover the spectrogram.
    """

    spec_size: tuple[int, int] = (1024, 128)
    patch_size: tuple[int, int] = (16, 16)
    patch_stride: tuple[int, int] = (16, 16)

    def __post_init__(self) -> None:
        """Check the sizes, axis by axis."""
        axes = zip(("frames", "mel bins"), self.spec_size, self.patch_size, self.patch_stride, strict=True)
        for axis, spec, patch, stride in axes:
            if min(spec, patch, stride) < 1:
                raise ValueError(
                    f"spec_size, patch_size, patch_stride are {spec}, {patch}, {stride} {axis}, expected 1 up"
                )
            if patch > spec:
                raise ValueError(f"patch_size is {patch} {axis}, expected at most the {spec} of spec_size")
            if stride > patch:
                raise ValueError(f"patch_stride is {stride} {axis}, expected at most the {patch} of patch_size")
            if stride == patch and spec % patch:
                raise ValueError(f"spec_size has {spec} {axis}, expected a multiple of the {patch} of patch_size")

    @property
    def shape(self) -> tuple[int, int]:
        """Patches along time and frequency."""
        return grid_shape(self.spec_size, self.patch_size, self.patch_stride)

    @property
    def num_patches(self) -> int:
        """Patches of a spectrogram."""
        return self.shape[0] * self.shape[1]

    def patchify(self, spec: Tensor) -> Tensor:
        """Cut ``(B, C, frames, mel bins)`` into ``(B, num_patches, patch frames * patch bins * C)``."""
        return patchify(spec, self.patch_size, self.patch_stride)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Put patches back into ``(B, C, frames, mel bins)``: the mean where they overlap, 0 where none reaches."""
        return unpatchify(patches, self.spec_size, self.patch_size, self.patch_stride)
