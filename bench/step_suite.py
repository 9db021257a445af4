"""Whole steps by every provider: right or wrong first, then time, memory, and where the time goes."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from audiomae import AudioMAE, AudioMAEConfig
from audiomae.training.blocks import compile_blocks
from bench.accuracy import Judge, attempt
from bench.compare import Plan, compare, is_compiled
from bench.measure import MIB, measure_ceilings, peak_bytes, saved_tensor_bytes
from bench.precision import name_of
from bench.provenance import provenance
from bench.rows import Row
from bench.step import Gradient, Step, build_finetuning_step, build_pretraining_step
from bench.turns import Laps, Mark, unmarked

EXACT_CLIPS = 2
"""Clips at a time in float64, which takes much memory."""

PARTS = ("masks", "encoder", "decoder", "loss", "optimiser")
CONFIGS: dict[str, Callable[[], AudioMAEConfig]] = {
    "ViT-B local": AudioMAEConfig,
    "ViT-S local": lambda: AudioMAEConfig.from_size("small"),
    "ViT-L local": lambda: AudioMAEConfig.from_size("large"),
    "ViT-B hybrid": lambda: AudioMAEConfig(decoder="hybrid"),
    "ViT-B global": lambda: AudioMAEConfig(decoder="global"),
}
"""Models whose pre-training step is measured, the default one first."""


def find_shares(step: Step, laps: Laps, rounds: int = 2) -> dict[str, float]:
    """Find where a step spends its time: shares of masks, encoder, decoder, loss, optimiser.

    Forward and backward of a part count together; their borders are the encoder's and the decoder's output, in forward
    as the modules return them, in backward as their gradients are complete.
    """
    model = step.model
    assert isinstance(model, AudioMAE)
    samples: list[dict[str, float]] = []

    def timed(turn: int, mark: Mark) -> None:
        def border(name: str, later: str) -> Callable[..., None]:
            def hook(module: object, inputs: object, output: Tensor) -> None:
                mark(name)
                output.register_hook(lambda gradient: mark(later))

            return hook

        hooks = [
            model.encoder.register_forward_hook(border("encoder", "decoder")),
            model.decoder.register_forward_hook(border("decoder", "loss")),
        ]
        step(turn, mark)
        for handle in hooks:
            handle.remove()

    for turn in range(rounds):
        samples.append(laps.time(timed, turn))
    medians = {part: statistics.median(sample[part] for sample in samples) for part in PARTS}
    return {part: ms / sum(medians.values()) for part, ms in medians.items()}


def measure_pretraining_step(
    plan: Plan,
    device: torch.device,
    batch: int,
    dtype: torch.dtype,
    *,
    task: str = "ViT-B local",
    config: AudioMAEConfig | None = None,
    compiled: bool = True,
    budget_s: float = 30,
) -> list[Row]:
    """Measure the pre-training step of the reference and the fused form, each also under torch.compile.

    Args:
        plan: How much is measured.
        device: Where.
        batch: Clips.
        dtype: Of autocast, float32 for none.
        task: A name in :data:`CONFIGS`.
        config: Another model than the task's.
        compiled: Also with blocks under torch.compile; without, these providers are absent.
        budget_s: About how long to time, in seconds.
    """
    torch.compiler.reset()  # a process compiles one function for a few sizes only
    config = config or CONFIGS[task]()
    truth = build_pretraining_step("reference", device, batch, torch.float64, config).gradient(EXACT_CLIPS)
    steps = {}
    for name, impl in {"reference": "reference", "fused": "auto"}.items():
        for suffix, mode in {"": None, **(plan.compiler_modes(device) if compiled else {})}.items():
            steps[name + suffix] = build_pretraining_step(impl, device, batch, dtype, config)
            if suffix:
                compile_blocks(steps[name + suffix].model, mode=mode)
    with FlopCounterMode(display=False) as counter:
        plain = steps["reference"].gradient()
    about = Row(
        "steps", task, "fused", "reference", shape={"batch": batch}, dtype=name_of(dtype), about=provenance(device)
    )
    rows = measure_steps(plan, about, steps, truth, plain, dtype, device, budget_s=budget_s)
    right = {row.provider for row in rows if row.p50_ms}
    shares = {name: find_shares(steps[name], Laps(device, kernels=False)) for name in right}
    if not compiled:
        reason = "compiling takes minutes here, and is measured with --full"
        names = [name + suffix for name in steps for suffix in plan.compiler_modes(device)]
        rows += [replace(about, provider=name, absent=reason) for name in names]
    flops, rate = counter.get_total_flops(), measure_ceilings(device, dtype)[1]
    for row in rows:
        if row.p50_ms:
            row.least_flops, row.tflop_per_s = flops, flops / row.p50_ms / 1e9
            row.facts["model FLOPs utilisation"] = flops / (row.p50_ms / 1e3) / rate
            row.facts |= shares.get(row.provider, {})
    return rows


def measure_finetuning_step(
    plan: Plan, device: torch.device, batch: int, dtype: torch.dtype, *, budget_s: float = 20
) -> list[Row]:
    """Measure the fine-tuning step with the paper's masking, 0.3 of time and of frequency, and on all patches."""
    masked = "masked 0.3/0.3"
    truth = build_finetuning_step("reference", device, batch, torch.float64, masked=True).gradient(EXACT_CLIPS)
    steps = {
        f"reference, {masked}": build_finetuning_step("reference", device, batch, dtype, masked=True),
        f"fused, {masked}": build_finetuning_step("auto", device, batch, dtype, masked=True),
    }
    plain = steps[f"reference, {masked}"].gradient()
    about = Row(
        "fine-tuning",
        "ViT-B",
        f"fused, {masked}",
        "fused, all patches",
        shape={"batch": batch},
        dtype=name_of(dtype),
        about=provenance(device),
    )
    everything = build_finetuning_step("auto", device, batch, dtype, masked=False)
    return measure_steps(
        plan, about, steps, truth, plain, dtype, device, unjudged={"fused, all patches": everything}, budget_s=budget_s
    )


def measure_steps(
    plan: Plan,
    about: Row,
    steps: Mapping[str, Step],
    truth: Gradient,
    plain: Gradient,
    dtype: torch.dtype,
    device: torch.device,
    *,
    unjudged: Mapping[str, Step] | None = None,
    budget_s: float,
) -> list[Row]:
    """Judge steps, then measure those that are right.

    Args:
        plan: How much is measured.
        about: What the rows have in common.
        steps: By provider.
        truth: Loss and gradients of the reference in float64.
        plain: Those of the reference in ``dtype``.
        dtype: Precision.
        device: Where.
        unjudged: Steps that compute something else, for comparison.
        budget_s: About how long to time, in seconds.
    """
    judge = Judge(truth, plain, dtype, whole=True)
    wrong: list[Row] = []
    fields: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        start = time.perf_counter()
        error = attempt(lambda step=step: judge.find_error(step.gradient()))
        if error:
            wrong.append(replace(about, provider=name, wrong=error))
            continue
        fields[name] = {"compile_s": time.perf_counter() - start} if is_compiled(name) else {}
        fields[name]["error"] = judge.error
    right = {name: step for name, step in steps.items() if name in fields} | dict(unjudged or {})
    for name, step in right.items():
        step(0, unmarked)  # makes the optimiser's state
        existing = (*step.model.parameters(), *step.model.buffers(), *step.inputs)
        fields.setdefault(name, {})["saved_mib"] = saved_tensor_bytes(step.forward, existing) / MIB
        fields[name]["peak_mib"] = peak_bytes(lambda step=step: step(0, unmarked), device) / MIB
    timed = compare(plan, about, right, Laps(device, kernels=False), fields=fields, budget_s=budget_s)
    for row in timed:
        row.facts["clips/s"] = 1e3 * row.shape["batch"] / row.p50_ms
    return wrong + timed
