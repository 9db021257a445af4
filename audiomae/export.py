"""Export a model for programs that do without this package: as ONNX, or as a program of PyTorch alone.

    python -m audiomae.export finetuned.safetensors --out model.onnx
    python -m audiomae.export pretrained.pth --out encoder.pt2 --front-end

A classifier gives "logits" (B, classes). A pre-trained model, or any other file without a classifier, gives "tokens"
(B, 1 + L, D) of its encoder, a class token first. The input is "spec", normalised spectrograms (B, channels, frames,
mel bins). With --front-end it is "waveform" (B, samples) at the model's sample rate, of exactly the samples that its
frames take, and "lengths" (B,) int64: how many of them are the clip's own, in front of any padding. B is free.

Everything is float32 and computed as published code does, by PyTorch's own operators. Before the file appears, it is
compared with the model on random input: it may differ by 1e-4 of the largest output. It holds the configuration with
the names of the classes as JSON: in ONNX's metadata as audiomae_config, in a .pt2 as its extra file config.json.

ONNX takes pip install 'audiomae[export]'.
"""

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from audiomae.checkpoints import NATIVE_METADATA, load_classifier_or_encoder, load_encoder
from audiomae.classifier import AudioClassifier
from audiomae.config import EncoderConfig
from audiomae.training.config import SetupError

PROG = "audiomae.export"
CONFIG_FILE = "config.json"
LARGEST_DIFFERENCE = 1e-4
"""Between the outputs of a file and its model, as a share of the largest, or of 1 if that is less."""
BATCHES = (1, 3)
"""Clips at a time that are compared; the file is made with another number."""


@dataclass(frozen=True)
class ExportConfig:
    """Settings of the command."""

    checkpoint: tyro.conf.Positional[str]
    """Model, fine-tuned or pre-trained: a file, folder or hub id."""
    out: Path
    """Where to write, a name that ends in .onnx or .pt2."""
    front_end: bool = False
    """Take waveforms instead of spectrograms."""
    encoder: bool = False
    """Give the tokens of the encoder, also where there is a classifier."""


class WaveformModel(nn.Module):
    """A model that takes waveforms.

    Args:
        model: Takes spectrograms.
        config: Of the spectrograms.

    Raises:
        ValueError: A model of several channels.
    """

    def __init__(self, model: nn.Module, config: EncoderConfig):
        super().__init__()
        if config.in_channels != 1:
            raise ValueError(f"the model hears {config.in_channels} channels, expected 1: a waveform is one")
        self.model, self.front_end, self.frames = model, config.front_end(), config.spec_size[0]

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """Compute the model's output on ``waveform (B, samples)``, of which ``lengths (B,)`` are the clips' own."""
        return self.model(self.front_end(waveform, self.frames, lengths))


def build(config: ExportConfig) -> tuple[EncoderConfig, nn.Module]:
    """Load what is exported, in its reference form.

    Raises:
        ValueError: Settings that do not go together, or a checkpoint that does not serve.
        OSError: A checkpoint or folder that is missing.
    """
    if config.out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"out is {config.out}, expected a name that ends in .onnx or .pt2")
    if not config.out.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {config.out.parent}")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if config.out.suffix == ".onnx" and missing:
        raise ValueError(
            f"out is {config.out}, which takes {' and '.join(missing)}: pip install 'audiomae[export]', or write a .pt2"
        )
    load = load_encoder if config.encoder else load_classifier_or_encoder
    model_config, loaded = load(config.checkpoint, impl="reference")
    model = WaveformModel(loaded, model_config) if config.front_end else loaded
    return model_config, model.eval().requires_grad_(False)


def random_inputs(model: nn.Module, config: EncoderConfig, batch: int) -> dict[str, Tensor]:
    """Draw inputs of an exported model by name, the same ones for a batch size every time."""
    generator = torch.Generator().manual_seed(batch)
    if not isinstance(model, WaveformModel):
        return {"spec": torch.randn(batch, config.in_channels, *config.spec_size, generator=generator)}
    samples = model.front_end.num_samples(config.spec_size[0])
    lengths = torch.randint(samples + 1, (batch,), generator=generator)
    lengths[0] = samples
    return {"waveform": torch.randn(batch, samples, generator=generator) / 10, "lengths": lengths}


def export_program(model: nn.Module, inputs: dict[str, Tensor]) -> ExportedProgram:
    """Export a model for any batch size.

    Args:
        model: In the reference form.
        inputs: Of its ``forward`` by name and in order, at least two clips.
    """
    batch = Dim("batch")
    return torch.export.export(
        model, tuple(inputs.values()), dynamic_shapes={name: {0: batch} for name in inputs}, strict=False
    )


def write(
    program: ExportedProgram, path: Path, config: EncoderConfig, inputs: Sequence[str], output: str
) -> Callable[..., Tensor] | None:
    """Write a program to a file.

    Args:
        program: As :func:`export_program` makes it.
        path: Ends in .onnx or .pt2. ONNX puts more than 2 GB of weights into a second file beside it.
        config: Of the model.
        inputs: Names.
        output: Name.

    Returns:
        A function that computes what the file says; None for ONNX without onnxruntime.
    """
    settings = json.dumps(config.to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's exporters warn of what they do themselves
        if path.suffix == ".pt2":
            # A change of autocast, as the front end has it, could be saved but not loaded. This unfolds it.
            torch.export.save(program.run_decompositions({}), path, extra_files={CONFIG_FILE: settings})
            return torch.export.load(path).module()
        batch = Dim("batch")
        onnx = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes={name: {0: batch} for name in inputs},
            dynamo=True,
            verbose=False,
        )
        assert onnx is not None  # as it is without dynamo
        onnx.model.metadata_props[NATIVE_METADATA] = settings
        onnx.save(path)
    return None if find_spec("onnxruntime") is None else open_onnx(path)


def open_onnx(path: Path) -> Callable[..., Tensor]:
    """Make a function that computes what an ONNX file says, on the CPU."""
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run_file(*tensors: Tensor) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run_file


@torch.no_grad()
def compare(run_file: Callable[..., Tensor], model: nn.Module, config: EncoderConfig) -> str:
    """Compare outputs on random input; return a line that tells how far they lie apart.

    Raises:
        ValueError: Too far.
    """
    differences, sizes = [], []
    for batch in BATCHES:
        inputs = random_inputs(model, config, batch).values()
        expected = model(*inputs)
        differences.append((run_file(*inputs) - expected).abs().max())
        sizes.append(expected.abs().max())
    difference, largest = torch.stack(differences).max().item(), torch.stack(sizes).max().item()
    line = f"largest difference from the model {difference:.1e}, with outputs up to {largest:.2g}"
    if not difference <= LARGEST_DIFFERENCE * max(largest, 1.0):
        raise ValueError(f"nothing written: {line}, expected at most {LARGEST_DIFFERENCE} of that")
    return line


def run(config: ExportConfig) -> list[str]:
    """Export, compare, and return lines that tell what was written.

    Raises:
        ValueError: Settings or a checkpoint that do not serve, or a file that differs from the model.
        OSError: A file or folder that is missing or cannot be written.
    """
    model_config, model = build(config)
    inputs = random_inputs(model, model_config, batch=2)
    output = "logits" if any(isinstance(part, AudioClassifier) for part in model.modules()) else "tokens"
    program = export_program(model, inputs)
    with TemporaryDirectory(dir=config.out.parent, prefix=config.out.name) as folder:
        path = Path(folder, config.out.name)
        run_file = write(program, path, model_config, list(inputs), output)
        if run_file is None:
            comparison = "not compared with the model, which takes onnxruntime: pip install 'audiomae[export]'"
        else:
            comparison = compare(run_file, model, model_config)
        files = sorted(Path(folder).iterdir())
        size = sum(file.stat().st_size for file in files)
        for file in files:
            file.replace(config.out.with_name(file.name))
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in {**inputs, output: model(*inputs.values())}.items()}
    described = [f"{name} ({', '.join(map(str, ['B', *shape]))})" for name, shape in shapes.items()]
    return [
        f"wrote {' and '.join(str(config.out.with_name(file.name)) for file in files)}, {size / 1e6:.1f} MB: "
        f"{', '.join(described[:-1])} -> {described[-1]}",
        comparison,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. What is wrong ends it with one line and exit status 2."""
    try:
        config = tyro.cli(ExportConfig, args=arguments, prog=f"python -m {PROG}", description=__doc__)
        try:
            print("\n".join(run(config)))
        except (ValueError, OSError) as error:
            raise SetupError(str(error)) from error
    except SetupError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
