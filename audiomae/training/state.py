"""What a run leaves on disk: its state, to go on from, and its weights, to use."""

import shutil
from pathlib import Path
from typing import Any

import torch

from audiomae.checkpoints import CheckpointError, save_weights
from audiomae.checkpoints.files import load_pickle, replacing
from audiomae.model import AudioMAE
from audiomae.training.config import PretrainConfig

LAST = "checkpoint-last.pt"
WEIGHTS = "weights.safetensors"


def find_checkpoint(config: PretrainConfig) -> Path | None:
    """Find the checkpoint that a run goes on from, None for a new run.

    Raises:
        FileNotFoundError: ``resume`` names a file that does not exist.
        FileExistsError: A new run would overwrite the checkpoint of an earlier one.
    """
    last = config.output_dir / LAST
    if config.resume is None:
        if last.exists():
            raise FileExistsError(
                f"{config.output_dir} holds a run already: go on with --resume auto, or choose another --output-dir"
            )
        return None
    if config.resume == "auto":
        return last if last.exists() else None
    if not Path(config.resume).is_file():
        raise FileNotFoundError(f"no checkpoint at {config.resume}, expected a file that an earlier run saved")
    return Path(config.resume)


def save_state(config: PretrainConfig, model: AudioMAE, optimizer: torch.optim.Optimizer, epochs_done: int) -> None:
    """Save the state of a run after an epoch, and its weights as safetensors.

    Files appear whole or not at all. Everything random in an epoch is drawn from the seed and the epoch's number, so
    this is all that a run needs to go on exactly.

    Args:
        config: The run. Every ``keep_every`` epochs the state is kept under a name of its own too.
        model: Its model.
        optimizer: Its optimiser.
        epochs_done: Epochs trained so far.
    """
    state = {
        "format": "audiomae",
        "config": model.config.to_dict(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epochs_done": epochs_done,
    }
    folder = config.output_dir
    with replacing(folder / LAST) as temporary:
        torch.save(state, temporary)
    if config.keep_every and epochs_done % config.keep_every == 0:
        with replacing(folder / f"checkpoint-epoch-{epochs_done:04d}.pt") as temporary:
            shutil.copyfile(folder / LAST, temporary)
    save_weights(folder / WEIGHTS, model)


def load_state(path: Path, model: AudioMAE, optimizer: torch.optim.Optimizer) -> int:
    """Load the state of a run into its model and optimiser.

    Returns:
        The epochs that it has trained.

    Raises:
        CheckpointError: The file is broken, not the state of a run, or that of another model.
    """
    state: dict[str, Any] = load_pickle(path)
    missing = {"config", "model", "optimizer", "epochs_done"} - state.keys()
    if missing:
        raise CheckpointError(f"{path} is not the state of a run: it lacks {', '.join(sorted(missing))}")
    saved, wanted = state["config"], model.config.to_dict()
    different = [f"{k} {saved.get(k)} (now {wanted[k]})" for k in wanted if saved.get(k) != wanted[k]]
    if different:
        raise CheckpointError(f"{path} is the state of another model: {', '.join(different)}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epochs_done"])
