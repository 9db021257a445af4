"""Rows as ``pytest bench/`` writes them, of figures that are made up but go together."""

from dataclasses import replace
from typing import Any

from bench.rows import Row

CPU = {
    "device": "Some Processor @ 2.5GHz",
    "cores": 2,
    "threads": 1,
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "timm": "1.0.20",
    "commit": "abc1234",
    "date": "2026-11-26",
}
GPU = CPU | {"device": "NVIDIA H200", "driver": "570.1"}

OPERATORS = {
    # Tokens, width, milliseconds of the reference, bytes, FLOPs.
    "random_mask": (512, None, 0.45, 70_000, 0),
    "patch_embed": (103, 768, 55.7, 4.2e6, 3.2e8),
    "flash_attention": (103, 768, 16.7, 2.0e7, 1.8e8),
    "mlp": (103, 768, 158.0, 6.2e7, 2.3e10),
    "add_layer_norm": (103, 768, 1.54, 2.0e7, 0),
    "layer_norm_add": (512, 512, 4.3, 5.0e7, 0),
    "restore_tokens": (512, 512, 26.1, 1.2e7, 0),
    "window_attention": (512, 512, 139.0, 9.0e7, 4.7e8),
    "local_block": (512, 512, 700.0, 1.0e8, 8.0e10),
    "masked_mse": (512, None, 13.1, 1.5e7, 0),
    "linear_masked_mse": (512, 512, 37.6, 3.0e7, 2.6e9),
}
SPEEDS = {"reference": 1.0, "reference + compile": 1.25, "fused": 2.0, "fused + compile": 2.2}
"""How much faster than the reference each provider is."""


def timed(row: Row, ms: float, ratio: float, **more: Any) -> Row:
    """A row with times about a median, and ratios about another."""
    same = row.provider == row.baseline
    return replace(
        row,
        p20_ms=0.95 * ms,
        p50_ms=ms,
        p80_ms=1.1 * ms,
        ratio=1.0 if same else ratio,
        ratio_p20=1.0 if same else 0.9 * ratio,
        ratio_p80=1.0 if same else 1.05 * ratio,
        rounds=15,
        **more,
    )


def ceiling_rows(about: dict[str, Any], dtype: str, gb_per_s: float, tflop_per_s: float) -> list[Row]:
    return [
        Row("ceilings", "copy", "torch", "torch", facts={"GB/s": gb_per_s}, about=about),
        Row("ceilings", "matrix product", "torch", "torch", dtype=dtype, facts={"TFLOP/s": tflop_per_s}, about=about),
    ]


def operator_rows(about: dict[str, Any], dtype: str, batch: int, speed: float = 1.0) -> list[Row]:
    """All operators by all providers; ``speed`` is a device's over a slow processor's where products bound."""
    rows = []
    for operator, (tokens, width, ms, least, flops) in OPERATORS.items():
        cases = [(tokens, 1.0)] + [(n, n / 103) for n in (221, 307, 513) if operator == "flash_attention"]
        for count, growth in cases:
            shape = {"batch": batch, "tokens": count} | ({"width": width} if width else {})
            if operator in ("window_attention", "local_block"):
                shape["window"] = "4x4"
            about_row = Row("operators", operator, "fused", "reference", shape=shape, dtype=dtype, about=about)
            providers = dict(SPEEDS)
            if operator == "local_block":
                providers["timm"] = 1.1
            if operator == "window_attention":
                providers["sdpa"] = 1.4
            if operator == "flash_attention":
                providers |= {"sdpa-flash": 1.02, "math": 0.6}
                reason = "flash-attn is not installed"
                rows += [replace(about_row, provider=name, absent=reason) for name in ("fa2", "fa3", "fa4")]
            for provider, ratio in providers.items():
                faster = speed if flops > 1e9 else max(1.0, speed / 9)
                time = ms * growth * (batch / 8) / faster / ratio
                row = replace(about_row, provider=provider)
                modes = {"all": 1.0} if operator == "random_mask" else {"forward": 0.4, "backward": 0.6, "both": 1.0}
                for mode, part in modes.items():
                    seconds = time * part / 1e3
                    moved, done = int(least * growth * part * batch / 8), int(flops * growth * part * batch / 8)
                    more = {
                        "mode": mode,
                        "least_bytes": moved,
                        "least_flops": done,
                        "gb_per_s": moved / seconds / 1e9,
                        "tflop_per_s": done / seconds / 1e12,
                        "ceiling_share": 0.3 * ratio / 2,
                        "bound": "compute" if flops > 1e9 else "memory",
                        "peak_mib": 40.0 * growth / ratio,
                        "saved_mib": 0.0 if operator == "random_mask" else 21.7 * growth / ratio,
                        "compile_s": 12.5 if "compile" in provider else None,
                    }
                    rows.append(timed(row, time * part, ratio * (1.1 if mode == "forward" else 1.0), **more))
    wrong = Row("operators", "mlp", "fa9", "reference", dtype=dtype, shape={"batch": batch, "tokens": 103}, about=about)
    wrong.shape["width"] = 768
    return [*rows, replace(wrong, wrong="output 0 is off by 1.00e-02, expected at most 1.00e-05")]


def step_rows(about: dict[str, Any], dtype: str, batch: int, ms: float) -> list[Row]:
    """The pre-training step; ``ms`` is the reference's."""
    rows = []
    for provider, ratio in SPEEDS.items():
        row = Row("steps", "ViT-B local", provider, "reference", shape={"batch": batch}, dtype=dtype, about=about)
        facts = {"clips/s": 1e3 * batch / (ms / ratio), "model FLOPs utilisation": 0.25 * ratio}
        if "compile" not in provider:
            facts |= {"masks": 0.001, "encoder": 0.25, "decoder": 0.6, "loss": 0.049, "optimiser": 0.1}
        more = {"peak_mib": 3300.0 / ratio, "saved_mib": 2200.0 / ratio, "facts": facts}
        compile_s = 61.0 if "compile" in provider else None
        rows.append(timed(row, ms / ratio, ratio, **more, compile_s=compile_s))
    return rows


def other_rows(about: dict[str, Any], dtype: str) -> list[Row]:
    """Fine-tuning, inference, front end, loader and loop."""
    tuning = Row("fine-tuning", "ViT-B", "", "fused, all patches", shape={"batch": 2}, dtype=dtype, about=about)
    encoder = Row("inference", "ViT-B encoder", "", "reference", dtype=dtype, about=about)
    encoder.shape.update(batch=4, tokens=513)
    mel = Row("front end", "log-mel", "", "torchaudio", shape={"batch": 8, "seconds": 10}, about=about)
    loader = Row("loader", "WAV", "", "libsndfile", shape={"clips": 64}, about=about)
    rows = [
        timed(replace(tuning, provider="fused, all patches"), 2600, 1),
        timed(replace(tuning, provider="reference, masked 0.3/0.3"), 1300, 2, saved_mib=300.0),
        timed(replace(tuning, provider="fused, masked 0.3/0.3"), 1000, 2.6, saved_mib=180.0),
        timed(replace(encoder, provider="reference"), 900, 1),
        timed(replace(encoder, provider="fused"), 600, 1.5),
        timed(replace(encoder, provider="timm"), 880, 1.02),
    ]
    for task in ("WAV", "FLAC"):
        rows.append(timed(replace(loader, task=task, provider="ClipDataset"), 64, 1.2, facts={"clips/s": 1000.0}))
        rows.append(timed(replace(loader, task=task, provider="libsndfile"), 77, 1, facts={"clips/s": 831.0}))
    for threads in (1, 2):
        mine = replace(mel, about=about | {"threads": threads})
        rows.append(timed(replace(mine, provider="LogMel"), 12 / threads, 2.45))
        rows.append(timed(replace(mine, provider="torchaudio"), 29.4 / threads, 1))
    loop = Row("training loop", "demo", "fused", "fused", facts={"waiting for data": 0.02, "workers": 2}, about=about)
    return [*rows, loop]


def growth_rows(about: dict[str, Any], dtype: str, speed: float) -> list[Row]:
    """Time against batch and window."""
    rows = []
    for provider, ratio in (("reference", 1.0), ("fused", 2.0)):
        for operator, (tokens, width, ms, _, _) in OPERATORS.items():
            shape = {"tokens": tokens} | ({"width": width} if width else {})
            ms = ms / speed
            windowed = operator in ("window_attention", "local_block")
            shape |= {"window": "4x4"} if windowed else {}
            for mode in ("both",) if operator != "random_mask" else ("all",):
                about_row = Row("operators", operator, provider, "reference", mode, dtype=dtype, about=about)
                for batch in (1, 2, 4, 16, 32):
                    row = replace(about_row, shape={"batch": batch} | shape, varies="batch")
                    rows.append(timed(row, ms * batch / 8 / ratio, ratio))
                for window, cost in {"2x2": 0.9, "4x8": 1.1, "8x8": 1.4, "16x8": 2.2}.items() if windowed else ():
                    row = replace(about_row, shape={"batch": 8} | shape | {"window": window}, varies="window")
                    rows.append(timed(row, ms * cost / ratio, ratio))
    return rows


def cpu_rows() -> list[Row]:
    """A run on a processor."""
    two = CPU | {"threads": 2}
    return [
        *ceiling_rows(CPU, "float32", 29.0, 0.35),
        *operator_rows(CPU, "float32", 8),
        *ceiling_rows(two, "float32", 36.0, 0.61),
        *step_rows(two, "float32", 2, 9810.0),
        *other_rows(two, "float32"),
    ]


def gpu_rows() -> list[Row]:
    """A run on a GPU, with growth."""
    return [
        *ceiling_rows(GPU, "bfloat16", 4000.0, 700.0),
        *operator_rows(GPU, "bfloat16", 64, 1000.0),
        *operator_rows(GPU, "bfloat16", 512, 1200.0),
        *step_rows(GPU, "bfloat16", 64, 80.0),
        *other_rows(GPU, "bfloat16"),
        *growth_rows(GPU, "bfloat16", 300.0),
    ]
