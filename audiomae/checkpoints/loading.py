"""Loading: a configuration and its tensors, a whole model, or the start of an encoder, from any known file."""

from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from audiomae.checkpoints.files import CheckpointError, check_tensors, read
from audiomae.checkpoints.fitting import check_kinds
from audiomae.checkpoints.names import from_official, is_classifier, is_native, listed, shown
from audiomae.checkpoints.shapes import check_state, has_decoder, infer_config
from audiomae.classifier import AudioClassifier, AudioClassifierConfig
from audiomae.config import EncoderConfig
from audiomae.encoder import Block, Encoder
from audiomae.model import AudioMAE, AudioMAEConfig
from audiomae.positions import fit_positions


class Checkpoint(NamedTuple):
    """A file's content under our names.

    Attributes:
        config: As stored, or inferred from shapes.
        state: Of a whole model or of an encoder, every tensor checked against ``config``.
        classifier: Configuration of a native classifier; None elsewhere.
        head: Tensors of a classifier, ``fc_norm.*`` and ``head.*``; not checked.
    """

    config: AudioMAEConfig
    state: dict[str, Tensor]
    classifier: AudioClassifierConfig | None
    head: dict[str, Tensor]


def load(path_or_hub_id: str | Path) -> tuple[AudioMAEConfig, dict[str, Tensor]]:
    """Load a configuration and tensors under our names, on the CPU.

    The format is detected: a native file; an official Audio-MAE or image MAE, pre-trained or fine-tuned; a timm
    ``VisionTransformer``. Native weights have their configuration in the file, or beside it in a ``config.json``; for
    others it is inferred, as :func:`audiomae.checkpoints.shapes.infer_config` says. A classifier's ``head`` and
    ``fc_norm`` are left out.

    Args:
        path_or_hub_id: A file; a folder with a ``model.safetensors`` or ``pytorch_model.bin``, as ``save_pretrained``
            writes it; or ``"organisation/name"`` of such a repository on the Hugging Face Hub.

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
    """Load a whole pre-training model. Nothing may be missing, too much or of another shape.

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


def load_classifier(path_or_hub_id: str | Path, impl: str = "auto") -> AudioClassifier:
    """Load a fine-tuned model: a native one, an official Audio-MAE, or a timm one that pools the mean of its patches.

    Files that are not native tell neither the names of their classes nor whether one excludes another: the labels are
    empty then, and ``multi_label`` is True, as on AudioSet.

    Args:
        path_or_hub_id: As for :func:`load`.
        impl: Form of the operators.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: As for :func:`load`, or a file without a classifier.
    """
    return _make_classifier(path_or_hub_id, _open(path_or_hub_id), impl)


def load_encoder(path_or_hub_id: str | Path, impl: str = "auto") -> tuple[EncoderConfig, Encoder]:
    """Load the encoder of any file, pre-trained or fine-tuned; one that pools before its norm has no final norm.

    Args:
        path_or_hub_id: As for :func:`load`.
        impl: Form of the operators.

    Returns:
        The configuration of the encoder and its input, and the encoder.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: As for :func:`load`.
    """
    return _make_encoder(_open(path_or_hub_id), impl)


def load_classifier_or_encoder(
    path_or_hub_id: str | Path, impl: str = "auto"
) -> tuple[EncoderConfig, AudioClassifier | Encoder]:
    """Load a file for its outputs: logits by a classifier if it has one, else tokens by an encoder.

    Args:
        path_or_hub_id: As for :func:`load`.
        impl: Form of the operators.

    Returns:
        The configuration and what :func:`load_classifier` or :func:`load_encoder` makes.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: As for :func:`load`, or a classifier that is incomplete.
    """
    checkpoint = _open(path_or_hub_id)
    if not checkpoint.head:
        return _make_encoder(checkpoint, impl)
    model = _make_classifier(path_or_hub_id, checkpoint, impl)
    return model.config, model


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
    checkpoint = _open(path_or_hub_id)
    parts = sorted({name.partition(".")[0] for name in checkpoint.head})
    notes = [f"classifier left out: {', '.join(parts)}"] if parts else []
    return notes + _start_encoder(encoder, path_or_hub_id, checkpoint)


@torch.no_grad()
def start_classifier(model: AudioClassifier, path_or_hub_id: str | Path, *, reset_head: bool = False) -> list[str]:
    """Start a classifier from a file of any known format: its encoder, and its head if the file has one.

    Args:
        model: Filled in place.
        path_or_hub_id: As for :func:`load`.
        reset_head: Keep the model's own head, whatever the file has.

    Returns:
        A line for everything that was changed or left out, for the caller to print.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: As for :func:`start_encoder`, or, unless ``reset_head``, a head of other classes.
    """
    checkpoint = _open(path_or_hub_id)
    notes = _start_encoder(model.encoder, path_or_hub_id, checkpoint)
    if not checkpoint.head:
        return notes
    if reset_head:
        return [*notes, "the file's classifier left out: the head starts anew"]
    try:
        config = checkpoint.classifier or _infer_classifier(path_or_hub_id, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --reset-head starts with a new head") from error
    if config.num_classes != model.config.num_classes:
        raise CheckpointError(
            f"{path_or_hub_id} classifies {config.num_classes} classes, expected {model.config.num_classes}: "
            "--reset-head starts with a new head"
        )
    own = model.state_dict()
    if config.labels and model.config.labels and config.labels != model.config.labels:
        first = next(i for i, (a, b) in enumerate(zip(config.labels, model.config.labels, strict=True)) if a != b)
        raise CheckpointError(
            f"{path_or_hub_id} has {shown(config.labels[first])!r} as class {first}, "
            f"expected {shown(model.config.labels[first])!r}: --reset-head starts with a new head"
        )
    try:
        check_tensors({name: tuple(own[name].shape) for name in own if is_classifier(name)}, checkpoint.head)
    except CheckpointError as error:
        raise CheckpointError(f"{path_or_hub_id}: {error}; --reset-head starts with a new head") from error
    model.load_state_dict(own | checkpoint.head)
    return [*notes, f"head of {config.num_classes} classes taken from the file"]


def _make_classifier(path_or_hub_id: str | Path, checkpoint: Checkpoint, impl: str) -> AudioClassifier:
    config = checkpoint.classifier or _infer_classifier(path_or_hub_id, checkpoint)
    state = {name: tensor for name, tensor in checkpoint.state.items() if name.startswith("encoder.")}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.norm.")} | checkpoint.head
    try:
        check_state(config, state)
    except ValueError as error:
        raise CheckpointError(f"{path_or_hub_id}: {error}") from error
    model = AudioClassifier(config, impl)
    model.load_state_dict(state)
    return model


def _make_encoder(checkpoint: Checkpoint, impl: str) -> tuple[EncoderConfig, Encoder]:
    config = EncoderConfig(**checkpoint.config.encoder_settings())
    encoder = Encoder.from_config(config, final_norm="encoder.norm.weight" in checkpoint.state, impl=impl)
    encoder.load_state_dict(_encoder_state(checkpoint))
    return config, encoder


def _infer_classifier(path_or_hub_id: str | Path, checkpoint: Checkpoint) -> AudioClassifierConfig:
    """Configuration of a classifier whose file stores none."""
    for name in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"):
        if name not in checkpoint.head:
            raise CheckpointError(
                f"{path_or_hub_id} has no {name}, expected a classifier on the mean of the patch tokens: fc_norm, head"
            )
    settings = checkpoint.config.encoder_settings()
    try:
        return AudioClassifierConfig(**settings, num_classes=len(checkpoint.head["head.weight"]))
    except (ValueError, TypeError) as error:  # as of a head of no class, or of no dimension
        raise CheckpointError(f"{path_or_hub_id}: {error}") from error


def _encoder_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The encoder's tensors, without the encoder's prefix."""
    names = [name for name in checkpoint.state if name.startswith("encoder.")]
    return {name.removeprefix("encoder."): checkpoint.state[name] for name in names}


@torch.no_grad()
def _start_encoder(encoder: Encoder, path_or_hub_id: str | Path, checkpoint: Checkpoint) -> list[str]:
    """Fill an encoder, and tell what was changed or left out besides a classifier."""
    config, source = checkpoint.config, _encoder_state(checkpoint)
    notes = []
    if has_decoder(checkpoint.state):
        notes.append(f"decoder left out: {len(checkpoint.state) - len(source)} tensors")
    if encoder.norm is None and "norm.weight" in source:
        source = {name: tensor for name, tensor in source.items() if not name.startswith("norm.")}
        notes.append("final norm left out: the mean of the tokens is taken before a norm of its own")
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
    head = {name: tensor for name, tensor in contents.tensors.items() if is_classifier(name)}
    tensors = {name: tensor for name, tensor in contents.tensors.items() if not is_classifier(name)}
    classifier = None
    try:
        check_kinds(contents.tensors)
        state = _with_tau(tensors if any(map(is_native, tensors)) else from_official(tensors))
        if contents.config is None:
            config = infer_config(state)
        elif "num_classes" in contents.config:
            classifier = AudioClassifierConfig.from_dict(contents.config)
            config = AudioMAEConfig(**classifier.encoder_settings())
        else:
            config = AudioMAEConfig.from_dict(contents.config)
        check_state(config, state)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path_or_hub_id}: {error}") from error
    return Checkpoint(config, state, classifier, head)


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
