"""Checkpoint files: safe reading, from a path or the Hugging Face Hub, and atomic writing."""

import argparse
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

NATIVE_METADATA = "audiomae_config"
"""Metadata key of a native ``.safetensors`` file: JSON of the model's configuration."""
NATIVE_MODEL, NATIVE_CONFIG = "model", "config"
"""Keys of a native ``torch.save`` file: tensors by name, and the model's configuration as a dictionary."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
STATE_KEYS = (NATIVE_MODEL, "state_dict")

# What official files hold next to tensors. Paths, of any Python version, become ones that do no I/O.
SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (argparse.Namespace, "argparse.Namespace"),
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit."""


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: By name, as stored.
        config: The configuration of a native file, not yet checked; None elsewhere.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None


def read(path_or_hub_id: str | Path) -> Contents:
    """Read a safetensors or ``torch.save`` file, told apart by content, onto the CPU.

    Args:
        path_or_hub_id: A file, or ``"organisation/name"`` of a repository on the Hugging Face Hub that has a
            ``model.safetensors`` or ``pytorch_model.bin``.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: Not to be had from the Hub, no checkpoint, corrupt, or holding other classes.
    """
    path = _locate(path_or_hub_id)
    if _head(path)[8:9] == b"{":
        return _read_safetensors(path)
    content = load_pickle(path)
    state = next((content[key] for key in STATE_KEYS if key in content), content)
    return _checked(path, state, content.get(NATIVE_CONFIG) if NATIVE_MODEL in content else None)


def load_pickle(path: Path) -> dict[str, Any]:
    """Load the dictionary of a ``torch.save`` file onto the CPU.

    Unpickles tensors, plain values and what official files hold, and nothing else.

    Raises:
        CheckpointError: No such dictionary, corrupt, or holding other classes.
    """
    head = _head(path)
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(f"{path} is neither a safetensors nor a torch.save file: it begins with {head!r}")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt bytes end in any exception, of torch's readers and of the unpickler
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds a pickled {refused[1]}, which could run code and is refused: expected tensors by name"
            ) from error
        raise CheckpointError(f"{path} is truncated, corrupt or no torch.save file of tensors") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected a dictionary of tensors")
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes ``path`` at the end: at no time is there half a file.

    Raises:
        FileNotFoundError: No such directory.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {path.parent}")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(24)
    if not head:
        raise CheckpointError(f"{path} is empty, expected a checkpoint")
    return head


def _locate(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, expected a checkpoint file")
    if path.exists():
        return path
    looks_like_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)) and path.suffix not in SUFFIXES
    if not looks_like_hub_id or path.parent.is_dir():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    return _download(str(path_or_hub_id))


def _download(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    offline = False
    reason: Exception | None = None
    for filename in HUB_FILES:
        try:
            return Path(hf_hub_download(hub_id, filename, local_files_only=offline))
        except LocalEntryNotFoundError as error:
            # The Hub was out of reach, after long retries: ask only the cache for the other name.
            offline, reason = True, error
        except EntryNotFoundError as error:
            reason = error
        except (OSError, ValueError) as error:
            reason = error
            break
    first_line = str(reason).strip().partition("\n")[0]
    raise CheckpointError(
        f"{hub_id} is no file, and its {' or '.join(HUB_FILES)} cannot be had from the Hugging Face Hub: {first_line}"
    ) from reason


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error
    if NATIVE_METADATA not in metadata:
        return Contents(tensors, None)
    try:
        config = json.loads(metadata[NATIVE_METADATA])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} has metadata {NATIVE_METADATA} that is no JSON: {error}") from error
    return _checked(path, tensors, config)


def _checked(path: Path, tensors: Any, config: Any) -> Contents:
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path} holds {type(tensors).__name__}, expected a dictionary of tensors")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path} has {type(value).__name__} under {name!r}, expected tensors by name")
    if not isinstance(config, dict | None):
        raise CheckpointError(f"{path} has {type(config).__name__} as configuration, expected a dictionary")
    return Contents(dict(tensors), config)
