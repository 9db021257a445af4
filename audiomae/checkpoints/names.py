"""Parameter names: ours, those of the official Audio-MAE (and image MAE), and timm's.

The three differ in the first parts of a name only: ``encoder.blocks.0.attn.qkv.weight`` is ``blocks.0.attn.qkv.weight``
elsewhere. The functions rename a dictionary by that part and touch no value, so they also serve partial dictionaries
and dictionaries of gradients.
"""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

ENCODER = {name: f"encoder.{name}" for name in ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")}
DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_embed": "decoder.embed",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_blocks": "decoder.blocks",
    "decoder_norm": "decoder.norm",
    "decoder_pred": "decoder.pred",
}
CLASSIFIER = ("fc_norm", "head")
"""First parts of the names that a classifier adds to an encoder."""
LONGEST_NAME = 100


def from_official(tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename from the official Audio-MAE's names, which are image MAE's, to ours.

    Args:
        tensors: Values by official name; any part of a model, and any values.

    Raises:
        ValueError: A name that the official pre-training model does not have.
    """
    return _rename(tensors, ENCODER | DECODER)


def to_official(tensors: Mapping[str, T]) -> dict[str, T]:
    """Undo :func:`from_official`.

    Raises:
        ValueError: A name that is not ours.
    """
    return _rename(tensors, _inverse(ENCODER | DECODER))


def from_timm(tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename a timm ``VisionTransformer``'s names to those of our encoder.

    Leaves out ``head.*`` and ``fc_norm.*``, which belong to a classifier. A model that pools before its norm has
    ``fc_norm`` in place of ``norm``: what comes back then lacks ``encoder.norm.*``.

    Args:
        tensors: Values by timm's name; any part of a model, and any values.

    Raises:
        ValueError: A name of neither the encoder nor the classifier.
    """
    return _rename({name: value for name, value in tensors.items() if not is_classifier(name)}, ENCODER)


def to_timm(tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename our encoder to the names of timm's ``VisionTransformer``; leaves out ``decoder.*``, which timm has not.

    Raises:
        ValueError: A name that is not ours.
    """
    encoder = {name: value for name, value in tensors.items() if not name.startswith("decoder.")}
    return _rename(encoder, _inverse(ENCODER))


def is_classifier(name: str) -> bool:
    """Tell whether a parameter belongs to a classifier that stands on an encoder."""
    return name.partition(".")[0] in CLASSIFIER


def is_native(name: str) -> bool:
    """Tell whether a name is one of ours."""
    return name.startswith(("encoder.", "decoder."))


def listed(names: list[str], limit: int = 4) -> str:
    """Join the first names, and count the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(shown, names[:limit])) + more


def shown(name: str) -> str:
    """A name as messages show it: in a line, and not of megabytes."""
    cut = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
    return cut if cut.isprintable() else repr(cut)


def _rename(tensors: Mapping[str, T], prefixes: Mapping[str, str]) -> dict[str, T]:
    """Replace the prefix, a whole number of dotted parts, of each name."""
    renamed, unknown = {}, []
    for name, value in tensors.items():
        for source, target in prefixes.items():
            if name == source or name.startswith(f"{source}."):
                renamed[target + name.removeprefix(source)] = value
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"unknown parameters: {listed(unknown)}; expected names that begin with {', '.join(prefixes)}")
    return renamed


def _inverse(prefixes: Mapping[str, str]) -> dict[str, str]:
    return {target: source for source, target in prefixes.items()}
