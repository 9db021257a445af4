"""Models of other libraries before and after ``mae_kernels.fuse``: right or wrong, then time and memory."""

from collections.abc import Callable
from importlib.util import find_spec

import mae_kernels
import torch
from torch import Tensor, nn

from bench import audio_mae_models, mae_models
from bench.compare import Plan
from bench.precision import autocast, name_of
from bench.provenance import provenance
from bench.rows import Row
from bench.step import Step
from bench.step_suite import measure_steps
from bench.turns import Mark


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)()


def _image_mae() -> nn.Module:
    return mae_models.MaskedAutoencoderViT(embed_dim=768, depth=12, num_heads=12, norm_pix_loss=True)


def _audio_mae() -> nn.Module:
    return audio_mae_models.MaskedAutoencoderViT(decoder_depth=8, norm_pix_loss=True)


def _vit_mae() -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(ViTMAEConfig())


MODELS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, int, int]]] = {
    "image MAE, ViT-B": ("timm", _image_mae, (3, 224, 224)),
    "Audio-MAE, ViT-B": ("timm", _audio_mae, (1, 1024, 128)),
    "transformers ViTMAE, ViT-B": ("transformers", _vit_mae, (3, 224, 224)),
    "timm Swin-T": ("timm", lambda: _timm("swin_tiny_patch4_window7_224"), (3, 224, 224)),
    "timm Swin V2-T": ("timm", lambda: _timm("swinv2_tiny_window8_256"), (3, 256, 256)),
    "timm Swin V2-CR-T": ("timm", lambda: _timm("swinv2_cr_tiny_224"), (3, 224, 224)),
    "torchvision Swin-T": ("torchvision", lambda: _torchvision("swin_t"), (3, 224, 224)),
    "torchvision Swin V2-T": ("torchvision", lambda: _torchvision("swin_v2_t"), (3, 256, 256)),
    "timm ViT-B": ("timm", lambda: _timm("vit_base_patch16_224"), (3, 224, 224)),
}
"""What is fused, by a name: the library that has it, how it is built, with random weights, and an input's size."""


def build(
    make: Callable[[], nn.Module], size: tuple[int, int, int], device: torch.device, batch: int, dtype: torch.dtype
) -> Step:
    """Build the model, and a loss of it that no two calls compute on other random numbers."""
    torch.manual_seed(0)
    model = make().to(device).eval()  # without stochastic depth, whose draws depend on the precision
    image = torch.randn(batch, *size, device=device)
    if dtype == torch.float64:
        model, image = model.double(), image.double()

    def loss(mark: Mark, clips: slice) -> Tensor:
        torch.manual_seed(1)
        with autocast(device, dtype):
            output = model(image[clips])
        output = output[0] if isinstance(output, tuple) else getattr(output, "loss", output)
        if output.dim():
            output = output.to(torch.promote_types(output.dtype, torch.float32)).square().mean()
        mark("forward")
        return output

    return Step(model, loss, None, (image,))


def measure_drop_in(
    plan: Plan, task: str, device: torch.device, batch: int, dtype: torch.dtype, *, budget_s: float = 8
) -> list[Row]:
    """Measure forward and backward of a model before and after it is fused.

    Args:
        plan: How much is measured.
        task: A name in :data:`MODELS`.
        device: Where.
        batch: Images.
        dtype: Of autocast, float32 for none.
        budget_s: About how long to time, in seconds.

    Returns:
        A row for the model as it is, ``"original"``, and one for the fused one, with the number of modules that were
        replaced; or one that says that the library is absent.
    """
    library, make, size = MODELS[task]
    about = Row(
        "drop-in",
        task,
        "fused",
        "original",
        shape={"batch": batch},
        dtype=name_of(dtype),
        about=provenance(device),
    )
    if find_spec(library) is None:
        about.absent = f"{library} is not installed"
        return [about]
    truth = build(make, size, device, batch, torch.float64).gradient()
    steps = {name: build(make, size, device, batch, dtype) for name in ("original", "fused")}
    report = mae_kernels.fuse(steps["fused"].model)
    rows = measure_steps(plan, about, steps, truth, steps["original"].gradient(), dtype, device, budget_s=budget_s)
    for row in rows:
        if row.provider == "fused":
            row.facts["modules replaced"] = len(report.replaced)
    return rows
