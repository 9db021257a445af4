"""Loading: a configuration and its tensors, a whole model, or the start of an encoder, from any known file."""

from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from audiomae.checkpoints.files import CheckpointError, read
from audiomae.checkpoints.names import from_official, is_classifier, is_native, listed
from audiomae.checkpoints.shapes import check_state, has_decoder, infer_config
from audiomae.encoder import Block, Encoder
from audiomae.model import AudioMAE, AudioMAEConfig
from audiomae.positions import fit_positions


class Checkpoint(NamedTuple):
    """A file's content under our names.

    Attributes:
        config: As stored, or inferred from shapes.
        state: Of a whole model or of an encoder, every tensor checked against ``config``.
        ignored: Parts of a classifier, which are left out.
    """

    config: AudioMAEConfig
    state: dict[str, Tensor]
    ignored: list[str]


def load(path_or_hub_id: str | Path) -> tuple[AudioMAEConfig, dict[str, Tensor]]:
    """Load a configuration and tensors under our names, on the CPU.

    The format is detected: a native file; an official Audio-MAE or image MAE, pre-trained or fine-tuned; a timm
    ``VisionTransformer``. A native file stores its configuration; for others it is inferred, as
    :func:`audiomae.checkpoints.shapes.infer_config` says. A classifier's ``head`` and ``fc_norm`` are left out.

    Args:
        path_or_hub_id: A file, or ``"organisation/name"`` on the Hugging Face Hub.

    Returns:
        The configuration, and a state dictionary that fits it. A file without a decoder gives ``encoder.*`` alone, and
        that of a fine-tuned model, which pools before its norm, no ``encoder.norm.*``.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: Unreadable, unsafe, incomplete, or of another architecture.
    """
    checkpoint = _open(path_or_hub_id)
    return checkpoint.config, checkpoint.state


def load_model(path_or_hub_id: str | Path, impl: str = "auto") -> AudioMAE:
    """Load a whole model. Nothing may be missing, too much or of another shape.

    Args:
        path_or_hub_id: As for :func:`load`.
        impl: Form of the operators.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: As for :func:`load`, or a file without a decoder.
    """
    config, state = load(path_or_hub_id)
    if not has_decoder(state):
        raise CheckpointError(
            f"{path_or_hub_id} holds an encoder without a decoder, expected a whole model: "
            "audiomae.checkpoints.start_encoder takes an encoder alone"
        )
    model = AudioMAE(config, impl)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def start_encoder(encoder: Encoder, path_or_hub_id: str | Path) -> list[str]:
    """Start an encoder from a file of any known format, with or without a decoder or classifier.

    Position embeddings are fitted to the encoder's grid, and the patch weights of three channels are summed for an
    encoder of one: what it then does is what the source does with that channel three times.

    Args:
        encoder: Filled in place.
        path_or_hub_id: As for :func:`load`.

    Returns:
        A line for everything that was changed or left out, for the caller to print.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: As for :func:`load`, or an encoder of another architecture.
    """
    config, state, ignored = _open(path_or_hub_id)
    source = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    notes = []
    if ignored:
        notes.append(f"classifier left out: {', '.join(ignored)}")
    if has_decoder(state):
        notes.append(f"decoder left out: {len(state) - len(source)} tensors")
    if config.in_channels == 3 and encoder.in_channels == 1:
        source["patch_embed.proj.weight"] = source["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
        notes.append("patch weights of three channels summed into one")
    different = _differences(encoder, config, in_channels=source["patch_embed.proj.weight"].shape[1])
    if different:
        raise CheckpointError(f"{path_or_hub_id} does not fit the encoder: {'; '.join(different)}")
    source["pos_embed"], note = fit_positions(source["pos_embed"], config.grid.shape, encoder.grid.shape)
    if note:
        notes.append(note)
    own = {name: tensor for name, tensor in encoder.state_dict().items() if name not in source}
    if own:
        notes.append(f"not in the file and kept as they are: {listed(list(own))}")
    encoder.load_state_dict(own | source)
    return notes


def _open(path_or_hub_id: str | Path) -> Checkpoint:
    contents = read(path_or_hub_id)
    ignored = sorted({name.partition(".")[0] for name in contents.tensors if is_classifier(name)})
    tensors = {name: tensor for name, tensor in contents.tensors.items() if not is_classifier(name)}
    try:
        state = _with_tau(tensors if any(map(is_native, tensors)) else from_official(tensors))
        config = infer_config(state) if contents.config is None else AudioMAEConfig.from_dict(contents.config)
        check_state(config, state)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path_or_hub_id}: {error}") from error
    return Checkpoint(config, state, ignored)


def _with_tau(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the temperature of timm's newer Swin V2-CR block, log(1 / tau), into tau."""
    suffix = ".attn.logit_scale"
    return {
        name.replace(suffix, ".attn.tau"): tensor.neg().exp() if name.endswith(suffix) else tensor
        for name, tensor in state.items()
    }


def _differences(encoder: Encoder, config: AudioMAEConfig, in_channels: int) -> list[str]:
    block = cast(Block, encoder.blocks[0])
    settings = {
        "patch size": (config.patch_size, encoder.grid.patch_size),
        "input channels": (in_channels, encoder.in_channels),
        "width": (config.embed_dim, encoder.cls_token.shape[-1]),
        "depth": (config.depth, len(encoder.blocks)),
        "heads": (config.num_heads, block.attn.num_heads),
        "MLP width": (int(config.embed_dim * config.mlp_ratio), block.mlp.fc1.out_features),
    }
    return [f"{name} is {came}, expected {expected}" for name, (came, expected) in settings.items() if came != expected]
