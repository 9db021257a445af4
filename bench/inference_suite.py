"""The encoder over whole spectrograms, as fine-tuned models and embeddings run it, by every provider."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from audiomae import AudioMAE, AudioMAEConfig
from audiomae.checkpoints import to_timm
from audiomae.training.blocks import compile_blocks
from bench.accuracy import Judge, attempt
from bench.compare import Plan, compare, is_compiled
from bench.measure import MIB, peak_bytes
from bench.precision import autocast, name_of
from bench.provenance import provenance
from bench.rows import Row
from bench.turns import Call, Laps


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
    judge = Judge({"tokens": truth}, {"tokens": infer(models["reference"], 0)}, dtype)

    about = Row(
        "inference",
        "ViT-B encoder",
        "fused",
        "reference",
        shape={"batch": batch, "tokens": truth.shape[1]},
        dtype=name_of(dtype),
        about=provenance(device),
    )
    wrong: list[Row] = []
    calls: dict[str, Call] = {}
    fields: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        start = time.perf_counter()
        error = attempt(lambda model=model: judge.find_error({"tokens": infer(model, 0)}))
        first_s = time.perf_counter() - start
        if error:
            wrong.append(replace(about, provider=name, wrong=error))
            continue
        calls[name] = call(model)
        fields[name] = {"peak_mib": peak_bytes(lambda m=model: infer(m, 0), device) / MIB, "error": judge.error}
        if is_compiled(name):
            fields[name]["compile_s"] = first_s
    timed = compare(plan, about, calls, Laps(device, kernels=False), fields=fields, budget_s=budget_s)
    for row in timed:
        row.facts["clips/s"] = 1e3 * batch / row.p50_ms
    return wrong + timed
