"""What a run leaves on disk: its settings, its state, to go on from, and its weights, to use."""

import json
import reprlib
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiomae.atomic import replacing
from audiomae.checkpoints import CheckpointError, save_weights
from audiomae.checkpoints.checksum import has_checksum, save_with_checksum
from audiomae.checkpoints.files import BrokenFileError, check_tensors, load_pickle
from audiomae.checkpoints.fitting import check_kinds
from audiomae.checkpoints.names import shown
from audiomae.checkpoints.shapes import check_state
from audiomae.classifier import AudioClassifier
from audiomae.data import Manifest
from audiomae.model import AudioMAE
from audiomae.training.config import RunConfig, autocast_dtype
from audiomae.training.logging import LOG
from audiomae.training.parallel import sharded
from audiomae.training.progress import Progress

Model = AudioMAE | AudioClassifier
Stamp = tuple[Path, int, int]

LAST = "checkpoint-last.pt"
PREVIOUS = "checkpoint-previous.pt"
KEPT = "checkpoint-epoch-*.pt"
WEIGHTS = "weights.safetensors"
SETTINGS = "config.json"
LAUNCHES = "launches.jsonl"

# Settings that may differ between a run and the one that goes on from it without changing what is computed.
FREE_SETTINGS = {
    "output_dir",
    "resume",
    "workers",
    "log_every",
    "picture_every",
    "save_every",
    "save_steps",
    "keep_every",
    "device",
    "max_skipped",
    "skip_nonfinite",
    "hang_timeout",
    "allow_outside",
    "stats",
    "parallel",
    "checkpoint_activations",
}


def find_checkpoints(config: RunConfig) -> list[Path]:
    """Find the checkpoints that a run can go on from, the one to try first in front; none for a new run.

    Raises:
        FileNotFoundError: ``resume`` names a file that does not exist.
        FileExistsError: The output folder holds another run, or its log, which this one would overwrite.
        CheckpointError: ``resume`` names a file of weights alone.
    """
    folder = config.output_dir
    own = [folder / LAST, folder / PREVIOUS, *sorted(folder.glob(KEPT), reverse=True)]
    own = [path for path in own if path.exists()]
    if config.resume == "auto":
        return own
    chosen = None if config.resume is None else Path(config.resume)
    if chosen is not None and not chosen.is_file():
        raise FileNotFoundError(f"no checkpoint at {chosen}, expected a file that an earlier run saved")
    if chosen is not None and chosen.suffix == ".safetensors":
        raise CheckpointError(
            f"{chosen} holds weights alone, expected a {LAST}: start from weights with {config.start_flag}"
        )
    used = bool(own) or _has_lines(folder / LOG)
    if used and (chosen is None or chosen.resolve().parent != folder.resolve()):
        raise FileExistsError(f"{folder} holds a run already: go on with --resume auto, or choose another --output-dir")
    return [] if chosen is None else [chosen]


def stamp(paths: list[Path]) -> list[Stamp]:
    """Tell files from others that get their names later."""
    return [(path, (status := path.stat()).st_ino, status.st_mtime_ns) for path in paths]


def _has_lines(log: Path) -> bool:
    return log.exists() and log.stat().st_size > 0


def settings_of(config: RunConfig) -> dict[str, Any]:
    """All settings as JSON has them."""
    return json.loads(json.dumps(asdict(config), default=str))


def save_settings(config: RunConfig, launch: dict[str, Any]) -> None:
    """Write the settings of a run beside its log, and add with what it was started this time."""
    with replacing(config.output_dir / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings_of(config), indent=2) + "\n")
    with (config.output_dir / LAUNCHES).open("a", encoding="utf-8") as file:
        print(json.dumps(launch), file=file)


@dataclass(frozen=True)
class State:
    """The state of a run in a file.

    Everything random is drawn from the seed and the numbers of steps, epochs and clips, so that this is all that a run
    needs to go on exactly, on any number of ranks.

    Attributes:
        settings: Of the run.
        config: Of its model.
        model: Tensors by name.
        optimizer: State dictionary of the optimiser.
        progress: How far the run is, in plain values.
        steps_per_epoch: Steps of an epoch.
        launch: With what the process that saved it was started.
        clips: Fingerprint of the manifest.
    """

    settings: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    steps_per_epoch: int
    launch: dict[str, Any]
    clips: str


def save_state(folder: Path, state: State, model: Model, *, keep: int | None = None) -> None:
    """Save the state of a run, and its weights as safetensors. Files appear whole or not at all.

    The state that was the last one until now stays, as ``checkpoint-previous.pt``.

    Args:
        folder: The output folder.
        state: The state.
        model: Its model, with the weights.
        keep: Number of an epoch whose state is kept under a name of its own too.
    """
    with replacing(folder / LAST, previous=folder / PREVIOUS) as temporary:
        save_with_checksum(vars(state), temporary)
    if keep is not None:
        with replacing(folder / KEPT.replace("*", f"{keep:04d}")) as temporary:
            shutil.copyfile(folder / LAST, temporary)
    save_weights(folder / WEIGHTS, (model.config, state.model))


def read_state(path: Path) -> State:
    """Read the state of a run.

    Raises:
        BrokenFileError: The file is not as it was written.
        CheckpointError: It is not the state of a run, or holds other classes.
    """
    content = load_pickle(path)
    kinds = {"steps_per_epoch": int, "clips": str}
    for part in fields(State):
        if not isinstance(content.get(part.name), kinds.get(part.name, dict)):
            raise CheckpointError(f"{path} is not the state of a run: it has no {part.name}")
    if not has_checksum(path):
        raise BrokenFileError(f"{path} is corrupt: it has no checksum at its end")
    return State(**{part.name: content[part.name] for part in fields(State)})


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Attributes:
        path: The checkpoint.
        step: Its steps.
        progress: How far the run is, which goes on with the training.
        optimizer: State dictionary of the optimiser; empty once that has it.
        found: All checkpoints there were, as :func:`stamp` tells them.
        changed: Names of the settings that have changed since.
        broken: Checkpoints that should have come first and cannot be read.
        notes: Lines that tell all that.
    """

    path: Path
    step: int
    progress: Progress
    optimizer: dict[str, Any]
    found: list[Stamp]
    changed: list[str]
    broken: list[Path]
    notes: list[str]


def resume(
    paths: list[Path], config: RunConfig, model: Model, manifest: Manifest, *, steps_per_epoch: int, world_size: int
) -> Resumed:
    """Load the weights of a run into its model, and tell where it goes on.

    Args:
        paths: Checkpoints, the one to try first in front. One that is broken is told of, and the next one taken.
        config: The run that goes on.
        model: Its model.
        manifest: Its clips.
        steps_per_epoch: Steps that an epoch of it takes.
        world_size: Ranks that it has.

    Raises:
        CheckpointError: No file is whole, or the first one that is is not the state of a run, that of another model,
            or of epochs of another length, from which steps could not be counted on.
    """
    found = stamp(paths)
    broken: list[Path] = []
    notes: list[str] = []
    for path in paths:
        try:
            state = read_state(path)
        except BrokenFileError as error:
            broken.append(path)
            notes.append(str(error))
            continue
        progress, changed = _load(path, state, config, model, steps_per_epoch)
        epoch, step = divmod(progress.step, steps_per_epoch)
        within = f" and step {step} of {steps_per_epoch} of the next one" if step else ""
        notes.append(f"resumed from {path}, after epoch {epoch}{within}")
        ranks = state.launch.get("ranks")
        if ranks != world_size:
            notes.append(f"changed since the checkpoint: ranks were {_in_short(ranks)}, are {world_size}")
        others = _changed_precision(state, config, next(model.parameters()).device)
        notes += [f"changed since the checkpoint: {line}" for line in [*others, *changed.values()]]
        if state.clips != manifest.fingerprint():
            notes.append("changed since the checkpoint: the list of clips; skipped ones are counted anew")
            progress.unread = {}
            progress.nonfinite = {step: [] for step in progress.nonfinite}  # which still count
        return Resumed(path, progress.step, progress, state.optimizer, found, list(changed), broken, notes)
    raise CheckpointError("; ".join(notes))


def _changed_precision(state: State, config: RunConfig, device: torch.device) -> list[str]:
    """Tell if the same setting means another precision on this device."""
    was = state.launch.get("device_type")
    if was not in ("cpu", "cuda") or not config.precision == state.settings.get("precision") == "auto":
        return []
    before, now = (
        f"{str(autocast_dtype('auto', torch.device(kind))).removeprefix('torch.')} on {kind}"
        for kind in (was, device.type)
    )
    return [] if before == now else [f"precision was {before}, is {now}"]


def _load(
    path: Path, state: State, config: RunConfig, model: Model, steps_per_epoch: int
) -> tuple[Progress, dict[str, str]]:
    """Load the weights of a state, and tell how far it is and which settings have changed."""
    other_model = _differences({**type(model.config)().to_dict(), **state.config}, model.config.to_dict())
    if other_model:
        raise CheckpointError(f"{path} is the state of another model: {', '.join(other_model.values())}")
    try:
        progress = Progress(**state.progress)
        progress.check()
        epochs_done = -(-progress.step // state.steps_per_epoch)
        check_state(model.config, state.model)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} cannot be gone on from: {error}") from error
    if epochs_done > config.epochs:
        raise CheckpointError(f"{path} has {epochs_done} epochs behind it, the run has {config.epochs} in all")
    if state.steps_per_epoch != steps_per_epoch:
        raise CheckpointError(
            f"{path} counts {state.steps_per_epoch} steps an epoch, this run {steps_per_epoch}: "
            f"go on with the data, batch size and repeats of the checkpoint, or start anew with {config.start_flag}"
        )
    model.load_state_dict(state.model)
    compared = {k: v for k, v in settings_of(config).items() if k not in FREE_SETTINGS}
    return progress, _differences(state.settings, compared)


def resume_optimizer(optimizer: torch.optim.Optimizer, resumed: Resumed) -> None:
    """Move the state of a run's optimiser into it; its settings stay as they are.

    Args:
        optimizer: Of the model's parameters, which may be sharded.
        resumed: Where the run goes on.

    Raises:
        CheckpointError: It does not fit.
    """
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    try:
        if [group["params"] for group in resumed.optimizer["param_groups"]] != numbers:
            raise CheckpointError("its optimiser has other parameters, or in another order")
        for number, values in resumed.optimizer["state"].items():
            _check_moments(values, parameters[number])
        moments = {
            number: {name: sharded(value.contiguous(), parameters[number]) for name, value in values.items()}
            for number, values in resumed.optimizer["state"].items()
        }
        optimizer.load_state_dict({**resumed.optimizer, "state": moments})
        if len(optimizer.state) != len(parameters):
            raise CheckpointError("its optimiser lacks the moments of some parameters")
    except (ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{resumed.path} cannot be gone on from: {error}") from error
    resumed.optimizer.clear()  # the optimiser of a GPU has a copy
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)


def _check_moments(moments: dict[str, Tensor], parameter: Tensor) -> None:
    """Raise CheckpointError unless these are what AdamW knows of a parameter."""
    check_kinds(moments)
    shape = tuple(parameter.shape)
    check_tensors({"step": (), "exp_avg": shape, "exp_avg_sq": shape}, moments)
    if not moments["step"] >= 0:
        raise CheckpointError(f"its optimiser has taken {moments['step'].item()} steps, expected at least 0")


def set_aside(broken: list[Path], folder: Path) -> list[str]:
    """Rename checkpoints of a run's own folder that cannot be read, lest they push out the one before them."""
    own = [path for path in broken if path.parent == folder and path.exists()]
    return [f"{path.name} is kept as {path.rename(path.with_suffix('.broken')).name}" for path in own]


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, str]:
    """Tell which settings differ, by their names."""
    return {k: f"{k} was {_in_short(saved.get(k))}, is {wanted[k]}" for k in wanted if _differ(saved.get(k), wanted[k])}


def _differ(saved: Any, wanted: Any) -> bool:
    try:
        return bool(saved != wanted)
    except RuntimeError:  # of tensors, which no setting is
        return True


def _in_short(value: Any) -> str:
    """What a file holds, which can be anything, in a line."""
    return shown(value if isinstance(value, str) else " ".join(reprlib.repr(value).split()))
