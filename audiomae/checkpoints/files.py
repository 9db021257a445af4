"""Checkpoint files: safe reading, from a file, a folder or the Hugging Face Hub."""

import argparse
import json
import pathlib
import re
import reprlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from audiomae.checkpoints.checksum import checksum_matches, has_checksum
from audiomae.checkpoints.names import is_native, listed, shown

NATIVE_METADATA = "audiomae_config"
"""Metadata key of a native ``.safetensors`` file: JSON of the model's configuration."""
NATIVE_MODEL, NATIVE_CONFIG = "model", "config"
"""Keys of a native ``torch.save`` file: tensors by name, and the model's configuration as a dictionary."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_CONFIG = "config.json"
# Those of timm and transformers, which have the same name, lack them.
HUB_CONFIG_KEYS = {"spec_size", "embed_dim"}
STATE_KEYS = (NATIVE_MODEL, "state_dict")

# What official files hold next to tensors. Paths, of any Python version, become ones that do no I/O.
SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (argparse.Namespace, "argparse.Namespace"),
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
]


# What may come of a pickle. PyTorch's unpickler makes more: storages, its own functions and classes.
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, dict, OrderedDict, Counter, list, tuple, set),
    *(Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device, argparse.Namespace, pathlib.PurePosixPath),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit."""


class BrokenFileError(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: By name, as stored.
        config: The configuration in a native file or beside it, not yet checked; None elsewhere.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None


def read(path_or_hub_id: str | Path, **hub_options: Any) -> Contents:
    """Read a safetensors or ``torch.save`` file, told apart by content, onto the CPU.

    Tensors under our names that come without a configuration, in a file with a name of ``HUB_FILES``, take that of the
    ``config.json`` beside it, which ``save_pretrained`` writes.

    Args:
        path_or_hub_id: A file; a folder that has a ``model.safetensors`` or ``pytorch_model.bin``; or
            ``"organisation/name"`` of a repository on the Hugging Face Hub that has one.
        **hub_options: For ``huggingface_hub.hf_hub_download``, as ``revision`` and ``token``.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: Not to be had from the Hub, no checkpoint, corrupt, or holding other classes.
    """
    path, hub_id = Path(path_or_hub_id), None
    if path.is_dir():
        path = _find_weights(path)
    elif not path.exists():
        hub_id = _checked_hub_id(path_or_hub_id)
        hub_options = {"local_files_only": False, **hub_options}
        path = _download_weights(hub_id, hub_options)
    contents = _read_file(path)
    if contents.config is not None or path.name not in HUB_FILES or not any(map(is_native, contents.tensors)):
        return contents
    if hub_id is None:
        config = path.with_name(HUB_CONFIG)
        return contents._replace(config=_read_config(config) if config.is_file() else None)
    downloaded = _download(hub_id, [HUB_CONFIG], hub_options)
    return contents._replace(config=None if downloaded is None else _read_config(downloaded))


def check_tensors(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """Check that tensors have all the expected names and shapes, and no other.

    Raises:
        CheckpointError: Missing or unknown tensors, or wrong shapes.
    """
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    wrong = [
        f"{name} has shape {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = [f"{len(missing)} missing tensors: {listed(missing)}"] if missing else []
    problems += [f"{len(unknown)} unknown tensors: {listed(unknown)}"] if unknown else []
    problems += [f"{len(wrong)} of a wrong shape: {listed(wrong)}"] if wrong else []
    if problems:
        raise CheckpointError("; ".join(problems))


def load_pickle(path: Path) -> dict[str, Any]:
    """Load the dictionary of a ``torch.save`` file onto the CPU.

    Unpickles tensors, plain values and what official files hold, and nothing else.

    Raises:
        BrokenFileError: Empty, truncated or corrupt.
        CheckpointError: No dictionary, or holding other classes; or a whole file that does not fit into memory.
    """
    head = _head(path)
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise BrokenFileError(f"{path} is neither a safetensors nor a torch.save file: it begins with {head!r}")
    if not checksum_matches(path):
        raise BrokenFileError(f"{path} is corrupt: its bytes do not match its checksum")
    try:
        with _only_safe_globals():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt bytes end in any exception, of torch's readers and of the unpickler
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds a pickled {shown(refused[1])}, which could run code and is refused: "
                "expected tensors by name"
            ) from error
        if has_checksum(path):
            reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise CheckpointError(f"{path} is as it was written, but cannot be loaded: {reason}") from error
        raise BrokenFileError(f"{path} is truncated, corrupt or no torch.save file of tensors") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected a dictionary of tensors")
    other = next((type(value) for value in _parts(content) if type(value) not in _PLAIN), None)
    if other is not None:
        raise CheckpointError(
            f"{path} holds a pickled {other.__module__}.{other.__name__}, which is refused: "
            "expected tensors and plain values"
        )
    return content


@contextmanager
def _only_safe_globals() -> Iterator[None]:
    """Let pickles name ``SAFE_GLOBALS``, and none of the classes that packages allow for the whole process.

    PyTorch's own ``torch.distributed.tensor`` is one.
    """
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def _parts(content: Any) -> Iterator[Any]:
    """Everything in an object, once: it can hold itself."""
    found, seen = [content], set()
    while found:
        value = found.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            found += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            found += value
        elif isinstance(value, argparse.Namespace):
            found += vars(value).values()


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(24)
    if not head:
        raise BrokenFileError(f"{path} is empty, expected a checkpoint")
    return head


def _find_weights(folder: Path) -> Path:
    for filename in HUB_FILES:
        if (folder / filename).is_file():
            return folder / filename
    raise CheckpointError(f"{folder} is a directory without {' or '.join(HUB_FILES)}, expected a checkpoint")


def _checked_hub_id(path_or_hub_id: str | Path) -> str:
    path = Path(path_or_hub_id)
    looks_like_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)) and path.suffix not in SUFFIXES
    if not looks_like_hub_id or path.parent.is_dir():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    return str(path_or_hub_id)


def _download_weights(hub_id: str, options: dict[str, Any]) -> Path:
    path = _download(hub_id, HUB_FILES, options)
    if path is None:
        raise CheckpointError(
            f"{hub_id} is no file, and its repository on the Hugging Face Hub has no {' or '.join(HUB_FILES)}"
        )
    return path


def _download(hub_id: str, filenames: Sequence[str], options: dict[str, Any]) -> Path | None:
    """Download the first of these files that a repository has; None if it has none of them.

    Raises:
        CheckpointError: Nothing can be had from the repository.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason: Exception | None = None
    for filename in filenames:
        try:
            return Path(hf_hub_download(hub_id, filename, **options))
        except LocalEntryNotFoundError as error:
            # The Hub was out of reach, after long retries: ask only the cache for the other name.
            options, reason = {**options, "local_files_only": True}, error
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            reason = error
            break
    if reason is None:
        return None
    first_line = str(reason).strip().partition("\n")[0]
    raise CheckpointError(
        f"{hub_id} is no file, and its {' or '.join(filenames)} cannot be had from the Hugging Face Hub: {first_line}"
    ) from reason


def _read_config(path: Path) -> dict[str, Any] | None:
    """Read a ``config.json``; None if it is another library's."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    return config if isinstance(config, dict) and config.keys() >= HUB_CONFIG_KEYS else None


def _read_file(path: Path) -> Contents:
    if _head(path)[8:9] == b"{":
        return _read_safetensors(path)
    content = load_pickle(path)
    state = next((content[key] for key in STATE_KEYS if key in content), content)
    return _checked(path, state, content.get(NATIVE_CONFIG) if NATIVE_MODEL in content else None)


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            metadata = file.metadata() or {}
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:200]  # it may hold names from the file
        raise CheckpointError(f"{path} is truncated or corrupt: {reason}") from error
    if NATIVE_METADATA not in metadata:
        return Contents(tensors, None)
    try:
        config = json.loads(metadata[NATIVE_METADATA])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has metadata {NATIVE_METADATA} that is no JSON: {error}") from error
    return _checked(path, tensors, config)


def _checked(path: Path, tensors: Any, config: Any) -> Contents:
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path} holds {type(tensors).__name__}, expected a dictionary of tensors")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            key = reprlib.repr(name) if isinstance(name, str | int) else type(name).__name__
            raise CheckpointError(f"{path} has {type(value).__name__} under {key}, expected tensors by name")
    if not isinstance(config, dict | None):
        raise CheckpointError(f"{path} has {type(config).__name__} as configuration, expected a dictionary")
    return Contents(dict(tensors), config)
