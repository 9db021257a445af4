"""What a run leaves on disk: its settings, its state, to go on from, and its weights, to use."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from audiomae.checkpoints import CheckpointError, save_weights
from audiomae.checkpoints.files import load_pickle, replacing
from audiomae.checkpoints.shapes import check_state
from audiomae.classifier import AudioClassifier
from audiomae.model import AudioMAE
from audiomae.training.config import RunConfig
from audiomae.training.logging import LOG

Model = AudioMAE | AudioClassifier

LAST = "checkpoint-last.pt"
WEIGHTS = "weights.safetensors"
SETTINGS = "config.json"

# Settings that may differ between a run and the one that goes on from it without changing what is computed.
FREE_SETTINGS = {"output_dir", "resume", "workers", "log_every", "picture_every", "save_every", "keep_every", "device"}


def find_checkpoint(config: RunConfig) -> Path | None:
    """Find the checkpoint that a run goes on from, None for a new run.

    Raises:
        FileNotFoundError: ``resume`` names a file that does not exist.
        FileExistsError: The output folder holds another run, or its log, which this one would overwrite.
        CheckpointError: ``resume`` names a file of weights alone.
    """
    last = config.output_dir / LAST
    if config.resume == "auto":
        return last if last.exists() else None
    chosen = None if config.resume is None else Path(config.resume)
    if chosen is not None and not chosen.is_file():
        raise FileNotFoundError(f"no checkpoint at {chosen}, expected a file that an earlier run saved")
    if chosen is not None and chosen.suffix == ".safetensors":
        raise CheckpointError(
            f"{chosen} holds weights alone, expected a {LAST}: start from weights with {config.start_flag}"
        )
    used = last.exists() or _has_lines(config.output_dir / LOG)
    if used and (chosen is None or chosen.resolve().parent != config.output_dir.resolve()):
        raise FileExistsError(
            f"{config.output_dir} holds a run already: go on with --resume auto, or choose another --output-dir"
        )
    return chosen


def _has_lines(log: Path) -> bool:
    return log.exists() and log.stat().st_size > 0


def settings_of(config: RunConfig) -> dict[str, Any]:
    """All settings as JSON has them."""
    return json.loads(json.dumps(asdict(config), default=str))


def save_settings(config: RunConfig) -> None:
    """Write the settings of a run beside its log."""
    with replacing(config.output_dir / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings_of(config), indent=2) + "\n")


def save_state(
    config: RunConfig,
    model: Model,
    optimizer: torch.optim.Optimizer,
    *,
    epochs_done: int,
    steps_per_epoch: int,
    best: dict[str, Any] | None = None,
) -> None:
    """Save the state of a run after an epoch, and its weights as safetensors.

    Files appear whole or not at all. Everything random in an epoch is drawn from the seed and the epoch's number, so
    this is all that a run needs to go on exactly.

    Args:
        config: The run. Every ``keep_every`` epochs the state is kept under a name of its own too.
        model: Its model.
        optimizer: Its optimiser.
        epochs_done: Epochs trained so far.
        steps_per_epoch: Steps that each of them took.
        best: What is known of the best epoch so far, in plain values.
    """
    state = {
        "settings": settings_of(config),
        "config": model.config.to_dict(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epochs_done": epochs_done,
        "steps_per_epoch": steps_per_epoch,
        "best": best,
    }
    folder = config.output_dir
    with replacing(folder / LAST) as temporary:
        torch.save(state, temporary)
    if config.keep_every and epochs_done % config.keep_every == 0:
        with replacing(folder / f"checkpoint-epoch-{epochs_done:04d}.pt") as temporary:
            shutil.copyfile(folder / LAST, temporary)
    save_weights(folder / WEIGHTS, model)


class Resumed(NamedTuple):
    """Where a run goes on.

    Attributes:
        epochs_done: Epochs behind it.
        best: What was known of the best epoch so far; None where nothing was.
        changed: Names of the settings that have changed since.
        notes: A line for each of them.
    """

    epochs_done: int
    best: dict[str, Any] | None
    changed: list[str]
    notes: list[str]


def load_state(
    path: Path, config: RunConfig, model: Model, optimizer: torch.optim.Optimizer, *, steps_per_epoch: int
) -> Resumed:
    """Load the state of a run into its model and optimiser. Settings of the optimiser stay as ``config`` has them.

    Args:
        path: The checkpoint.
        config: The run that goes on.
        model: Its model.
        optimizer: Its optimiser.
        steps_per_epoch: Steps that an epoch of it takes.

    Raises:
        CheckpointError: The file is broken, not the state of a run, that of another model, or of epochs of another
            length, from which steps could not be counted on.
    """
    state = load_pickle(path)
    kinds = {
        "settings": dict,
        "config": dict,
        "model": dict,
        "optimizer": dict,
        "epochs_done": int,
        "steps_per_epoch": int,
    }
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise CheckpointError(f"{path} is not the state of a run: it has no {key}")
    # Once, the input's statistics were settings of the run.
    moved = {name: state["settings"][name] for name in ("sample_rate", "mean", "std") if name in state["settings"]}
    other_model = _differences({**type(model.config)().to_dict(), **moved, **state["config"]}, model.config.to_dict())
    if other_model:
        raise CheckpointError(f"{path} is the state of another model: {', '.join(other_model.values())}")
    if state["epochs_done"] > config.epochs:
        raise CheckpointError(f"{path} has {state['epochs_done']} epochs behind it, the run has {config.epochs} in all")
    if state["steps_per_epoch"] != steps_per_epoch:
        raise CheckpointError(
            f"{path} counts {state['steps_per_epoch']} steps an epoch, this run {steps_per_epoch}: "
            f"go on with the data, batch size and repeats of the checkpoint, or start anew with {config.start_flag}"
        )
    try:
        check_state(model.config, state["model"])
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        if len(optimizer.state) != sum(len(group["params"]) for group in optimizer.param_groups):
            raise CheckpointError("its optimiser lacks the moments of some parameters")
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be gone on from: {error}") from error
    model.load_state_dict(state["model"])
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)
    compared = {k: v for k, v in settings_of(config).items() if k not in FREE_SETTINGS}
    changed = _differences(state["settings"], compared)
    notes = [f"changed since the checkpoint: {line}" for line in changed.values()]
    return Resumed(state["epochs_done"], state.get("best"), list(changed), notes)


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, str]:
    """Tell which settings differ, by their names."""
    return {k: f"{k} was {saved.get(k)}, is {wanted[k]}" for k in wanted if saved.get(k) != wanted[k]}
