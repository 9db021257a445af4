"""The encoder over whole spectrograms, as fine-tuned models and embeddings run it, by every provider."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from audiomae import AudioMAE, AudioMAEConfig
from audiomae.checkpoints import to_timm
from audiomae.training.compiling import compile_blocks
from bench.accuracy import ROUNDING, attempt
from bench.compare import Plan, compare, is_compiled
from bench.measure import peak_bytes
from bench.provenance import provenance
from bench.rows import Row
from bench.step import autocast
from bench.turns import Call, Laps

MIB = 2**20


def measure_inference(
    plan: Plan,
    device: torch.device,
    batch: int,
    dtype: torch.dtype,
    *,
    config: AudioMAEConfig | None = None,
    compiled: bool = True,
    budget_s: float = 8,
) -> list[Row]:
    """Measure the tokens of ViT-B on all patches, without gradients, in evaluation mode.

    Args:
        plan: How much is measured.
        device: Where.
        batch: Clips.
        dtype: Of autocast, float32 for none.
        config: Another model.
        compiled: Also with blocks under torch.compile.
        budget_s: About how long to time, in seconds.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    reference = AudioMAE(config, impl="reference").to(device).eval()
    fused = AudioMAE(config).to(device).eval()
    fused.load_state_dict(reference.state_dict())
    models: dict[str, Callable[[Tensor], Tensor]] = {"timm": to_timm(reference)}
    for name, encoder in {"reference": reference.encoder, "fused": fused.encoder}.items():
        models[name] = encoder
        for suffix, mode in plan.compiler_modes(device).items() if compiled else ():
            twin = copy.deepcopy(encoder)
            compile_blocks(twin, mode=mode)
            models[name + suffix] = twin
    specs = [torch.randn(batch, 1, *reference.config.spec_size, device=device) for _ in range(4)]

    def infer(model: Callable[[Tensor], Tensor], turn: int) -> Tensor:
        with torch.inference_mode(), autocast(device, dtype):
            return model(specs[turn % len(specs)])

    def call(model: Callable[[Tensor], Tensor]) -> Call:
        return lambda turn, mark: infer(model, turn)

    with torch.inference_mode():
        truth = copy.deepcopy(reference.encoder).double()(specs[0].double())
    allowed = (infer(models["reference"], 0).double() - truth).abs().max().item()
    bound = 2 * allowed + ROUNDING[dtype] * truth.abs().max().item()

    errors: list[float] = []

    def find_error(model: Callable[[Tensor], Tensor]) -> str | None:
        error = (infer(model, 0).double() - truth).abs().max().item()
        errors.append(error / truth.abs().max().item())
        return None if error <= bound else f"tokens are off by {error:.2e}, expected at most {bound:.2e}"

    about = Row(
        "inference",
        "ViT-B encoder",
        "fused",
        "reference",
        shape={"batch": batch, "tokens": truth.shape[1]},
        dtype=str(dtype).removeprefix("torch."),
        about=provenance(device),
    )
    wrong: list[Row] = []
    calls: dict[str, Call] = {}
    facts: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        start = time.perf_counter()
        error = attempt(lambda model=model: find_error(model))
        first_s = time.perf_counter() - start
        if error:
            wrong.append(replace(about, provider=name, wrong=error))
            continue
        calls[name] = call(model)
        facts[name] = {"peak_mib": peak_bytes(lambda m=model: infer(m, 0), device) / MIB, "error": errors[-1]}
        if is_compiled(name):
            facts[name]["compile_s"] = first_s
    if about.provider not in calls:
        about = replace(about, provider=about.baseline)
    timed = compare(plan, about, calls, Laps(device, kernels=False), budget_s=budget_s)
    for row in timed:
        for field, value in facts[row.provider].items():
            setattr(row, field, value)
        row.facts["clips/s"] = 1e3 * batch / row.p50_ms
    return wrong + timed
