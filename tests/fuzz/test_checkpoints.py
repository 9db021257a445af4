"""Checkpoints that are broken, or that somebody made to do harm."""

import argparse
import pathlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audiomae import AudioClassifier, AudioMAE, AudioMAEConfig, EncoderConfig
from audiomae.checkpoints import (
    CheckpointError,
    load,
    load_classifier,
    load_encoder,
    load_model,
    start_classifier,
    start_encoder,
)
from audiomae.checkpoints.files import load_pickle
from audiomae.training.state import resume, resume_optimizer

from .configured import Configured, Tensors, configured, tensor_files
from .fuzzing import Fuzz
from .pickles import (
    ALLOWED_BY_OTHERS,
    CODE,
    call,
    dict_of,
    integer,
    laughs,
    list_of,
    named,
    nested,
    new,
    payload,
    real,
    tuple_of,
)
from .saved import STATE_LAYOUTS, WEIGHTS_LAYOUTS, Pickled, pickled
from .weights import BASES, CLASSIFIER, CLIPS, ODD, RUN, STEPS_PER_EPOCH, make_model, make_optimizer
from .worker import Target, Worker

# What may come out of a pickle: tensors, plain values, and what official files hold.
PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, dict, OrderedDict, Counter, list, tuple, set),
    *(torch.Size, torch.dtype, torch.device, argparse.Namespace, pathlib.PurePosixPath),
)


def write(folder: Path, case: Any) -> None:
    case.write(folder)


def read_pickle(folder: Path) -> None:
    found: list[Any] = [load_pickle(folder / "checkpoint")]
    seen = set()
    for value in found:  # which grows
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            assert type(value) in (Tensor, torch.nn.Parameter), type(value)
            continue
        assert type(value) in PLAIN, f"holds a {type(value)}"
        if isinstance(value, dict):
            found += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            found += value
        elif isinstance(value, argparse.Namespace):
            found += vars(value).values()


def read_state(folder: Path) -> None:
    config, state = load(folder / "checkpoint")
    check_config(config)
    check_tensors(state)


def read_model(folder: Path) -> None:
    model = load_model(folder / "checkpoint")
    check_config(model.config)
    check_tensors(model.state_dict())
    if is_small(model.config):
        frames = torch.zeros(1, model.config.in_channels, *model.config.spec_size)
        assert model(frames, seeds=torch.zeros(1, dtype=torch.int64)).loss.shape == ()


def read_classifier(folder: Path) -> None:
    model = load_classifier(folder / "checkpoint")
    check_config(model.config)
    if is_small(model.config):
        frames = torch.zeros(1, model.config.in_channels, *model.config.spec_size)
        assert model(frames).shape == (1, model.config.num_classes)


def read_encoder(folder: Path) -> None:
    config, encoder = load_encoder(folder / "checkpoint")
    check_config(config)
    check_tensors(encoder.state_dict())


def begin(folder: Path) -> None:
    model = make_model()
    notes = start_encoder(model.encoder, folder / "checkpoint")
    assert all(len(note.splitlines()) == 1 for note in notes), notes
    check_tensors(model.state_dict())


def begin_classifier(folder: Path) -> None:
    model = AudioClassifier(CLASSIFIER)
    notes = start_classifier(model, folder / "checkpoint")
    assert all(len(note.splitlines()) == 1 for note in notes), notes
    check_tensors(model.state_dict())


def read_hub(folder: Path) -> None:
    if not (folder / "checkpoint").is_dir():
        raise CheckpointError("no folder")
    AudioMAE.from_pretrained(folder / "checkpoint")


def go_on(folder: Path) -> None:
    model = make_model()
    resumed = resume([folder / "checkpoint"], RUN, model, CLIPS, steps_per_epoch=STEPS_PER_EPOCH, world_size=1)
    assert 0 <= resumed.step <= STEPS_PER_EPOCH * RUN.epochs, resumed.step
    assert all(len(note.splitlines()) == 1 and len(note) < 2000 for note in resumed.notes), resumed.notes
    optimizer = make_optimizer(model)
    resume_optimizer(optimizer, resumed)
    check_tensors(model.state_dict())
    optimizer.step()


def is_small(config: EncoderConfig) -> bool:
    return config.grid.num_patches < 100


def check_config(config: EncoderConfig) -> None:
    """Check that settings are of the types that their class tells."""
    defaults = AudioMAEConfig() if isinstance(config, AudioMAEConfig) else type(config)()
    for name, default in defaults.to_dict().items():
        value = getattr(config, name)
        if isinstance(default, tuple) and default:
            assert isinstance(value, tuple), f"{name} is {value!r}"
            assert all(type(item) is type(default[0]) for item in value), f"{name} is {value!r}"
        elif isinstance(default, float):
            assert type(value) in (int, float), f"{name} is {value!r}"
        elif default is not None:
            assert type(value) is type(default), f"{name} is {value!r}"


def check_tensors(state: dict[str, Tensor]) -> None:
    """Check that tensors are those of a model: dense, of floats, on the CPU, and as large as their memory."""
    for name, tensor in state.items():
        assert type(name) is str, name
        assert type(tensor) in (Tensor, torch.nn.Parameter), f"{name} is {type(tensor)}"
        assert tensor.layout is torch.strided, f"{name} is {tensor.layout}"
        assert tensor.device.type == "cpu", f"{name} is on {tensor.device}"
        assert tensor.is_floating_point(), f"{name} is {tensor.dtype}"
        assert not tensor.is_quantized
        assert tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size(), f"{name} repeats its memory"


READ = (read_state, read_model, read_classifier, read_encoder, begin, begin_classifier)
UNPICKLING = Target(write, (read_pickle,), (CheckpointError,))
PICKLES = Target(write, (read_pickle, read_state, read_model, read_classifier, begin_classifier), (CheckpointError,))
FILES = Target(write, (*READ, read_hub), (CheckpointError,))
RUNS = Target(write, (go_on,), (CheckpointError,))


# Each of these once ended otherwise than in a result or a refusal.
HARMFUL = (
    call("torch.Tensor", integer(31)),
    new("torch.storage.UntypedStorage"),
    named("pathlib.PosixPath"),
    dict_of(),
)
PICKLE_EXAMPLES = [
    *(Pickled("native", odd=((5, form),)) for form in sorted(ODD)),
    *(Pickled("timm", "legacy", odd=((-1, form),)) for form in ("sparse", "longer", "nested")),
    *(Pickled("native", planted=((place, value),)) for place in ("depth", -231) for value in HARMFUL),
    *(Pickled("classifier", planted=((name, integer(10**9)),)) for name in ("depth", "num_classes", "sample_rate")),
    *(Pickled("native", planted=(("mean", value),)) for value in (real(float("nan")), tuple_of(), laughs(40))),
    Pickled("native", planted=(("config", nested(30_000)),)),
    Pickled("timm", "zip", planted=((236, b"ctorch\nTensor\n(J\x00\x00\x00\x00tR"),)),
]
REVERSED = list_of(*map(integer, reversed(range(len([*make_model().parameters()])))))
STATE_EXAMPLES = [
    Pickled("run", "checksum", planted=(("params", REVERSED),)),
    *(Pickled("run", "checksum", odd=((-5, form),)) for form in sorted(ODD)),
    Pickled("run", "checksum", ((166, "negative"),)),
    *(Pickled("run", "checksum", planted=((name, HARMFUL[0]),)) for name in ("betas", "seed", "step", "exp_avg")),
    *(
        Pickled("run", "checksum", planted=((name, laughs(40)),))
        for name in ("betas", "depth", "ranks", "step", "best")
    ),
]
TENSOR_EXAMPLES = [
    *(Tensors("native", ((33, "name", name), (33, "name", name))) for name in ("a\nb", "x" * 9999)),
    Tensors("timm", ((-1, "name", "x" * 9999),)),
]
CONFIGURATION_EXAMPLES = [
    *(
        Configured("native", "folder", (setting,))
        for setting in (("depth", 10**6), ("decoder_depth", 10**6), ("embed_dim", 2**40))
    ),
    *(
        Configured("native", "zip", (setting,))
        for setting in (("mlp_ratio", 1e300), ("mean", None), ("decoder", ["local"]))
    ),
    *(
        Configured("native", "safetensors", (setting,))
        for setting in (("spec_size", [2**40, 128]), ("window", [4]), ("std", "1"))
    ),
    Configured("native", "zip", (("x" * 5000, 1),)),
    *(Configured("classifier", "folder", text=text) for text in ("[" * 50_000, "9" * 5000)),
]


@pytest.mark.share(12)
def test_pickles(fuzz: Fuzz):
    fuzz(PICKLES, pickled(BASES, WEIGHTS_LAYOUTS), PICKLE_EXAMPLES)


@pytest.mark.share(6)
def test_states_of_runs(fuzz: Fuzz):
    fuzz(RUNS, pickled(["run"], STATE_LAYOUTS), STATE_EXAMPLES)


@pytest.mark.share(4)
def test_safetensors(fuzz: Fuzz):
    fuzz(FILES, tensor_files(), TENSOR_EXAMPLES)


@pytest.mark.share(6)
def test_configurations(fuzz: Fuzz):
    fuzz(FILES, configured(), CONFIGURATION_EXAMPLES)


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("expression", [payload, named])
def test_code_is_refused_by_name(worker: Worker, layout: str, expression: Callable[[str], bytes]):
    """In a worker, since some of it would end the process that runs it."""
    for path in CODE:
        outcome = worker.run(UNPICKLING, Pickled("official", layout, planted=(("epoch", expression(path)),)))
        assert outcome.kind == "CheckpointError", (path, outcome)
        assert f"{path.rpartition('.')[2]}, which could run code and is refused" in outcome.text, (path, outcome)


def test_what_other_packages_allow_is_not_read(worker: Worker):
    for path in ALLOWED_BY_OTHERS:
        outcome = worker.run(UNPICKLING, Pickled("official", planted=(("epoch", named(path)),)))
        assert outcome.kind in ("CheckpointError", "BrokenFileError"), (path, outcome)


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("base", BASES)
def test_whole_files(base: str, layout: str, tmp_path: Path):
    Pickled(base, layout).write(tmp_path)
    read_pickle(tmp_path)
    for read in (read_state, begin_classifier) if base == "classifier" else (read_state,):
        read(tmp_path)
    (read_classifier if base in ("classifier", "timm") else read_model)(tmp_path)


@pytest.mark.parametrize("layout", ["checksum", "sealed"])
def test_whole_states(layout: str, tmp_path: Path):
    Pickled("run", layout).write(tmp_path)
    for read in RUNS.read:
        read(tmp_path)


@pytest.mark.parametrize("base", BASES)
def test_whole_safetensors(base: str, tmp_path: Path):
    Tensors(base).write(tmp_path)
    for read in (read_state, read_encoder):
        read(tmp_path)


@pytest.mark.parametrize("layout", ["safetensors", "zip", "folder"])
def test_whole_configurations(layout: str, tmp_path: Path):
    Configured("native", layout).write(tmp_path)
    for read in (read_state, read_model, read_encoder, begin, *([read_hub] if layout == "folder" else [])):
        read(tmp_path)
