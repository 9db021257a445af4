"""Files whose configuration is not that of their tensors, and safetensors files that are not what their headers say."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from audiomae import AudioMAEConfig
from audiomae.checkpoints import NATIVE_METADATA

from .edits import Edit, edited, edits, few, interesting
from .weights import BASES, content

SETTINGS = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 64, 10**6, 2**31, 2**63, 10**30, 10**400, 0.5, 1.0, 1e300, -0.0),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "local",
        "hybrid",
        "global",
        "true",
        "official",
        "sigmoid",
        "16",
        "x" * 5000,
    ),
    *(
        [],
        [1],
        [4, 4],
        [16, 16],
        [1, 1],
        [2**40, 2**40],
        [8, 128, 1],
        [0, 0],
        [-4, 16],
        [1.5, 2],
        ["a", "b"],
        [None] * 2,
    ),
    *({}, {"a": 1}, [[4], [4]], [[[[]]]], ["a", "a", "a"], ["\ud800", "\0", "\n"], [1, 2, 3]),
)
"""Values that a configuration may be given by JSON."""
HARMLESS: tuple[tuple[str, Any], ...] = (
    *(
        ("mean", -3),
        ("std", 2.5),
        ("sample_rate", 8000),
        ("bias_dropout", 0.5),
        ("norm_target", False),
        ("shift", [0, 0]),
    ),
    *(("labels", []), ("multi_label", False), ("activation", "softmax"), ("drop_path", 0.1), ("window", [1, 8])),
    *(("position_grid", "official"), ("labels", ["é", "\n", "x" * 5000])),
)
settings = st.sampled_from(SETTINGS)
KEYS = (*AudioMAEConfig().to_dict(), "num_classes", "labels", "multi_label", "activation", "drop_path", "x", "")


@dataclass(frozen=True)
class Configured:
    """A file, or a folder as ``save_pretrained`` makes it, whose configuration has other values.

    Attributes:
        base: ``"native"`` or ``"classifier"``.
        layout: ``"safetensors"``, ``"zip"`` or ``"folder"``.
        settings: Values by name; those of names that are lists are left out.
    """

    base: str
    layout: str
    settings: tuple[tuple[str, Any], ...] = ()
    text: str | None = None
    edits: tuple[Edit, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the file or folder."""
        config = {**content(self.base)["config"], **dict(self.settings)}
        tensors = content(self.base)["model"]
        text = json.dumps(config) if self.text is None else self.text
        path = folder / "checkpoint"
        match self.layout:
            case "safetensors":
                path.write_bytes(edited(save(tensors, {NATIVE_METADATA: text}), self.edits))
            case "zip":
                torch.save({"model": tensors, "config": config}, path)
            case "folder":
                path.mkdir()
                (path / "model.safetensors").write_bytes(save(tensors))
                (path / "config.json").write_bytes(edited(text.encode("utf-8", "surrogatepass"), self.edits))


_texts = st.one_of(
    st.sampled_from(
        ["", "null", "[]", "1", "{}", '{"a":', "NaN", '"x"', "[" * 50_000, "9" * 5000, '{"depth": ' + "9" * 5000 + "}"]
    )
)


def configured() -> st.SearchStrategy[Configured]:
    """Files whose configuration is not that of their tensors, or no configuration at all."""
    base, layout = st.sampled_from(["native", "classifier"]), st.sampled_from(["safetensors", "zip", "folder"])
    return st.one_of(
        st.builds(Configured, base, layout, few(st.sampled_from(HARMLESS))),
        st.builds(Configured, base, layout, few(st.tuples(st.sampled_from(KEYS), settings)), edits=edits(once_in=8)),
        st.builds(Configured, base, st.sampled_from(["safetensors", "folder"]), text=_texts),
    )


@dataclass(frozen=True)
class Tensors:
    """A safetensors file whose header has other values.

    Attributes:
        base: What it holds.
        header: (name or number of a tensor, field, value) of each change.
        length: The header's length instead of its own.
        edits: Of its bytes.
    """

    base: str
    header: tuple[tuple[int, str, Any], ...] = ()
    length: int | None = None
    edits: tuple[Edit, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the file."""
        whole = content(self.base)
        config = json.dumps(whole["config"]) if "config" in whole else None
        tensors = {name: value for name, value in whole.get("model", whole).items() if isinstance(value, Tensor)}
        data = save(tensors, {NATIVE_METADATA: config} if config else None)
        start = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:start])
        for number, field, value in self.header:
            name = list(header)[number % len(header)]
            match field:
                case "name":
                    header[str(value)] = header.pop(name)
                case "drop":
                    del header[name]
                    header["x"] = value
                case _ if isinstance(header[name], dict):
                    header[name][field] = value
        written = json.dumps(header).encode()
        length = len(written) if self.length is None else self.length
        data = struct.pack("<Q", length % 2**64) + written + data[start:]
        (folder / "checkpoint").write_bytes(edited(data, self.edits))


_fields = st.one_of(
    st.tuples(
        st.integers(0, 2**16),
        st.just("dtype"),
        st.sampled_from(["F64", "F16", "BF16", "I64", "BOOL", "C64", "F8_E4M3", "F4", "", None, 1]),
    ),
    st.tuples(st.integers(0, 2**16), st.just("shape"), st.lists(interesting | st.integers(0, 64), max_size=4)),
    st.tuples(st.integers(0, 2**16), st.just("data_offsets"), st.lists(interesting | st.integers(0, 9999), max_size=3)),
    st.tuples(
        st.integers(0, 2**16),
        st.just("name"),
        st.sampled_from(["", "__metadata__", "encoder.x", "a\nb", "head.weight", "x" * 9999]),
    ),
    st.tuples(st.integers(0, 2**16), st.sampled_from(["drop", "audiomae_config", "x"]), settings),
)


def tensor_files() -> st.SearchStrategy[Tensors]:
    """Safetensors files that are not what their headers say."""
    base = st.sampled_from(BASES)
    return st.one_of(
        st.builds(Tensors, base, few(_fields)),
        st.builds(Tensors, base, length=interesting),
        st.builds(Tensors, base, edits=edits(once_in=1)),
    )
