"""What an encoder is and what it listens to: the settings that every model of this package shares."""

import math
import reprlib
from dataclasses import asdict, dataclass, fields, replace
from types import UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from audiomae.frontend import LogMel
from audiomae.grid import PatchGrid

ENCODER_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""Width, depth and heads of the published ViT sizes."""


@dataclass(frozen=True)
class EncoderConfig:
    """Input and architecture of an encoder. The defaults are the paper's ViT-B on AudioSet.

    Attributes:
        spec_size: Frames and mel bins of a spectrogram.
        patch_size: Frames and mel bins of a patch.
        patch_stride: Step between patches along each axis; smaller than the patch, they overlap.
        in_channels: Channels of a spectrogram.
        embed_dim: Width of the encoder's tokens.
        depth: Blocks of the encoder.
        num_heads: Heads of the encoder.
        mlp_ratio: Hidden width of every MLP over the width of its tokens.
        position_grid: Layout of the fixed positions; "official" is the transposed one of released checkpoints.
        sample_rate: Sample rate of the waveforms behind the spectrograms, Hz.
        mean: Mean of the log-mel spectrograms, which become (x - mean) / (2 std).
        std: Their standard deviation.
    """

    spec_size: tuple[int, int] = (1024, 128)
    patch_size: tuple[int, int] = (16, 16)
    patch_stride: tuple[int, int] = (16, 16)
    in_channels: int = 1
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    position_grid: Literal["true", "official"] = "true"
    sample_rate: int = 16_000
    mean: float = -4.2677393
    std: float = 4.5689974

    def __post_init__(self) -> None:
        """Check what is true of single settings; sizes are checked against each other where they meet."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as JSON has tuples
                object.__setattr__(self, field.name, tuple(value))
        self.check_positive("in_channels", "embed_dim", "depth", "num_heads", "mlp_ratio", "sample_rate", "std")

    def check_positive(self, *names: str) -> None:
        """Raise ValueError unless these settings are more than 0, or None."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")

    @classmethod
    def from_size(cls, size: str, **settings: Any) -> Self:
        """Take the encoder of a published size: tiny, small, base, large or huge.

        Args:
            size: Its name.
            **settings: Any other fields.

        Raises:
            ValueError: An unknown size.
        """
        if size not in ENCODER_SIZES:
            raise ValueError(f"size is {size!r}, expected one of {', '.join(ENCODER_SIZES)}")
        embed_dim, depth, num_heads = ENCODER_SIZES[size]
        return cls(**{"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, **settings})

    def resized(self, size: str) -> Self:
        """Change the encoder to a published size; errors as in :meth:`from_size`."""
        other = self.from_size(size)
        return replace(self, embed_dim=other.embed_dim, depth=other.depth, num_heads=other.num_heads)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Undo :meth:`to_dict`, also after JSON has turned tuples into lists.

        Raises:
            ValueError: A setting that this version does not know, or a value of another type.
        """
        types = get_type_hints(cls)
        unknown = sorted(
            name[:100] if type(name) is str and name.isidentifier() else _in_short(name)
            for name in settings
            if name not in types
        )
        if unknown:
            raise ValueError(f"model configuration has unknown settings: {', '.join(unknown)}")
        for name, value in settings.items():
            if not _fits(value, types[name]):
                expected = types[name].__name__ if isinstance(types[name], type) else types[name]
                raise ValueError(f"{name} is {_in_short(value)}, expected {expected}")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings by name."""
        return asdict(self)

    def encoder_settings(self) -> dict[str, Any]:
        """Return the settings of the encoder alone by name, whatever else the model has."""
        return {field.name: getattr(self, field.name) for field in fields(EncoderConfig)}

    @property
    def grid(self) -> PatchGrid:
        """The patch grid."""
        return PatchGrid(self.spec_size, self.patch_size, self.patch_stride)

    def front_end(self) -> LogMel:
        """Make the front end that turns waveforms into the spectrograms which the encoder expects."""
        return LogMel(self.sample_rate, self.spec_size[1], mean=self.mean, std=self.std)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from a file is of a type that settings have; a list for a tuple, a number that is no NaN."""
    parts = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) is Literal:
        return type(value) is str and value in parts
    if get_origin(kind) is tuple:
        if type(value) not in (list, tuple):
            return False
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if type(value) is int:
        return kind in (int, float) and abs(value) < 2**63
    return type(value) is kind and (kind is not float or math.isfinite(value))


def _in_short(value: Any) -> str:
    """What a file holds, which can be anything, in a line."""
    return " ".join(reprlib.repr(value).split())[:100]
