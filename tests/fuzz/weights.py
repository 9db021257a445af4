"""Small checkpoints: what files of every kind hold, and other forms that their tensors can have."""

import argparse
import pathlib
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from audiomae import AudioClassifier, AudioClassifierConfig, AudioMAE, AudioMAEConfig
from audiomae.checkpoints import to_official
from audiomae.data import Manifest
from audiomae.training.config import PretrainConfig
from audiomae.training.progress import Progress
from audiomae.training.state import State, settings_of

BASES = ("native", "official", "classifier", "timm")
"""Kinds of weights; ``"run"`` is the state of a run."""
ENCODER: dict[str, Any] = {"spec_size": (8, 128), "patch_size": (4, 16), "patch_stride": (4, 16), "depth": 1}
MODEL = AudioMAEConfig(
    **ENCODER,
    embed_dim=8,
    num_heads=2,
    decoder_dim=8,
    decoder_depth=2,
    decoder_heads=2,
    decoder="hybrid",
    hybrid_global_layers=1,
    window=(2, 2),
    shift=(1, 0),
)
OFFICIAL = AudioMAEConfig(**ENCODER, embed_dim=64, num_heads=1, decoder_dim=16, decoder_depth=1, decoder_heads=2)
CLASSIFIER = AudioClassifierConfig(**ENCODER, embed_dim=8, num_heads=2, num_classes=3, labels=("a", "b", "c"))
RUN = PretrainConfig(epochs=4)
STEPS_PER_EPOCH = 10
CLIPS = Manifest([("a.wav", ())])


def make_model() -> AudioMAE:
    """The model of ``MODEL``, with the same weights each time."""
    torch.manual_seed(0)
    return AudioMAE(MODEL)


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a run, after a step."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def content(base: str) -> dict[str, Any]:
    """What a file of a kind holds. Dictionaries and lists are new ones, tensors are not."""
    return _copied(_content(base))


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [*map(_copied, value)]
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


@cache
def _content(base: str) -> dict[str, Any]:
    model = make_model()
    match base:
        case "native":
            return {"model": dict(model.state_dict()), "config": MODEL.to_dict()}
        case "official":
            args = argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath("/out"), distributed=True)
            state = to_official(AudioMAE(OFFICIAL).state_dict())
            return {"model": state, "args": args, "epoch": 3}
        case "classifier":
            return {"model": dict(AudioClassifier(CLASSIFIER).state_dict()), "config": CLASSIFIER.to_dict()}
        case "timm":
            names = {"head.weight": torch.ones(3, 64), "head.bias": torch.ones(3)}
            names |= {"fc_norm.weight": torch.ones(64), "fc_norm.bias": torch.ones(64)}
            encoder = to_official(AudioMAE(OFFICIAL).encoder.state_dict(prefix="encoder."))
            return {name: value for name, value in encoder.items() if not name.startswith("norm.")} | names
        case "run":
            optimizer = make_optimizer(model).state_dict()
            state = {name: value.detach() for name, value in model.state_dict().items()}
            progress, launch = vars(Progress(step=15, unread={3: (1, "gone")})), {"ranks": 1}
            return vars(
                State(
                    settings_of(RUN),
                    MODEL.to_dict(),
                    state,
                    optimizer,
                    progress,
                    STEPS_PER_EPOCH,
                    launch,
                    CLIPS.fingerprint(),
                )
            )
    raise ValueError(f"no content {base}")


def _with_attributes(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.dim, tensor.detach, tensor.note = OrderedDict(), 1, "a"  # type: ignore[method-assign, assignment, attr-defined]
    return tensor


def _quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


ODD: dict[str, Callable[[Tensor], Any]] = {
    **{
        str(dtype): lambda tensor, dtype=dtype: tensor.to(dtype)
        for dtype in (
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.bool,
            torch.complex64,
            torch.float8_e4m3fn,
        )
    },
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "quantized": _quantized,
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "expanded": lambda tensor: tensor.flatten()[:1].expand(tensor.numel()).view(tensor.shape),
    "reversed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "part": lambda tensor: torch.stack([tensor, tensor])[1],
    "parameter": lambda tensor: torch.nn.Parameter(tensor.detach().clone()),
    "buffer": lambda tensor: torch.nn.Buffer(tensor),
    "attributes": _with_attributes,
    "conjugate": lambda tensor: torch.complex(tensor, tensor).conj(),
    "negative": lambda tensor: torch.complex(tensor, tensor).conj().imag,
    "nan": lambda tensor: tensor * float("nan"),
    "nothing": lambda tensor: tensor.flatten()[:0],
    "scalar": lambda tensor: tensor.flatten()[0],
    "wider": lambda tensor: tensor[None],
    "longer": lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
    "larger": lambda tensor: tensor.flatten()[:1].expand(1 << 40),
    "number": lambda tensor: 1.0,
    "list": lambda tensor: [tensor],
    "storage": lambda tensor: tensor.untyped_storage(),
    "array": lambda tensor: tensor.numpy(),
}
"""Other forms that a tensor can have."""
