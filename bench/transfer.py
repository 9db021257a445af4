"""Does self-supervision pay? Families of General MIDI instruments, told apart by instruments never heard before.

    python -m bench.transfer --out runs/transfer          # within an hour on two processors

Clips of 128 instruments are rendered from a soundfont (see ``bench.instruments``); in each of the 16 families whole
instruments are held out, and none of their recordings is in another split. A small Audio-MAE is pre-trained on the
training instruments without their labels. Then, at the same number of steps and for several seeds:

- ``fine-tune``: the pre-trained encoder is fine-tuned;
- ``linear probe``: a norm and a linear layer are trained on the frozen pre-trained encoder;
- ``from scratch``: the same encoder is trained from random weights.

A few clips of each training instrument are labelled, others with each seed. The best epoch is chosen on the validation
instruments; the table reports the test instruments. Every run is a run of ``audiomae.pretrain`` or
``audiomae.finetune`` in a process of its own, one for each processor at a time.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from bench.instruments import InstrumentSet, render
from bench.provenance import provenance

CLIPS_PER_INSTRUMENT = 40
LABELLED_PER_INSTRUMENT = 10
SECONDS = 1.295
"""128 frames of ``LogMel``."""

MODEL = {"model.spec-size": (128, 128), "model.embed-dim": 128, "model.depth": 4, "model.num-heads": 2}
DECODER = {"model.decoder-dim": 64, "model.decoder-depth": 4, "model.decoder-heads": 4}
PRETRAINING = {"epochs": 40, "warmup-epochs": 4, "batch-size": 32, "repeats": 1, "base-lr": 8e-3, "picture-every": 20}
FINETUNING = {"epochs": 20, "warmup-epochs": 2, "batch-size": 32, "repeats": 1, "eval-every": 2, "time-mask": 24}
ARMS: dict[str, dict[str, object]] = {
    "fine-tune": {"base-lr": 4e-3},
    "linear probe": {"base-lr": 1.28e-1, "freeze": True},
    "from scratch": {"base-lr": 4e-3},
}
"""Rates of ``--search``: the encoder's is the one with the highest accuracy on the validation instruments, summed over
fine-tuning and training from scratch, so that both have the same; the probe's is its own best."""
SEARCHED: dict[str, tuple[float, ...]] = {
    "fine-tune": (4e-3, 8e-3, 1.6e-2),
    "linear probe": (3.2e-2, 1.28e-1),
    "from scratch": (2e-3, 4e-3, 8e-3, 1.6e-2),
}
SEARCH_SEED = 1000
"""Draws the labelled clips and weights of the search; the table uses others."""


def run(module: str, folder: Path, settings: dict[str, object]) -> float:
    """Run a command of the package on one processor, unless it has run before; return the seconds it took.

    Raises:
        RuntimeError: The command fails, or has run with other settings.
    """
    command = [
        sys.executable,
        "-m",
        module,
        "--output-dir",
        str(folder),
        "--resume",
        "auto",
        "--workers",
        "0",
        "--fused",
    ]
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        command += [f"--{name}", *map(str, values)]
    record = folder / "command.json"
    if record.exists():
        earlier = json.loads(record.read_text())
        if earlier["command"] != command[1:]:
            raise RuntimeError(f"{folder} holds a run of other settings: choose another --out")
        return earlier["seconds"]
    start = time.perf_counter()
    result = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip() or result.returncode}")
    seconds = round(time.perf_counter() - start, 1)
    record.write_text(json.dumps({"command": command[1:], "seconds": seconds}) + "\n")
    return seconds


def draw_labelled(instruments: InstrumentSet, per_instrument: int, seed: int, path: Path) -> Path:
    """Write a manifest of some clips of every training instrument, drawn by the seed."""
    with instruments.train.open(newline="") as file:
        rows = list(csv.DictReader(file))
    draw = np.random.default_rng(seed)
    by_program: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_program.setdefault(row["program"], []).append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "program"])
        writer.writeheader()
        for clips in by_program.values():
            for index in sorted(draw.choice(len(clips), per_instrument, replace=False)):
                absolute = instruments.train.parent.resolve() / clips[index]["path"]
                writer.writerow({**clips[index], "path": str(absolute)})
    return path


def finetune(
    out: Path, instruments: InstrumentSet, weights: Path, arm: str, seed: int, labelled: Path, base_lr: object
) -> dict[str, float]:
    """Train one arm with one seed; return accuracy on validation and test instruments, and seconds."""
    settings = {**MODEL, **FINETUNING, **ARMS[arm], "base-lr": base_lr, "seed": seed, "dataset": "manifest"}
    settings |= {"data": labelled, "valid-data": instruments.valid, "test-data": instruments.test}
    if arm != "from scratch":
        settings["checkpoint"] = weights
    folder = out / arm.replace(" ", "-") / f"lr-{base_lr}-seed-{seed}"
    seconds = run("audiomae.finetune", folder, settings)
    best = json.loads((folder / "results.json").read_text())["best"]
    return {"valid": best["valid"]["top-1"], "test": best["test"]["top-1"], "seconds": seconds}


def search(out: Path, instruments: InstrumentSet, weights: Path, processors: int) -> None:
    """Print the validation accuracy of every arm at the learning rates that are tried."""
    labelled = draw_labelled(instruments, LABELLED_PER_INSTRUMENT, SEARCH_SEED, out / "labelled-search.csv")
    jobs = [(arm, rate) for arm, rates in SEARCHED.items() for rate in rates]
    with ThreadPoolExecutor(processors) as pool:
        found = pool.map(lambda job: finetune(out, instruments, weights, job[0], SEARCH_SEED, labelled, job[1]), jobs)
        for (arm, rate), result in zip(jobs, found, strict=True):
            print(f"{arm:>12} base_lr {rate:g}: valid {result['valid']:.4f}", flush=True)


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """The results as Markdown: mean, standard deviation and range over seeds, and the difference to from scratch."""
    lines = [
        "| | test accuracy, mean over seeds | deviation | lowest to highest | above from scratch, seed by seed |",
        "|---|---|---|---|---|",
    ]
    scratch = [result["test"] for result in results["from scratch"]]
    for arm, runs in results.items():
        test = [result["test"] for result in runs]
        gains = [a - b for a, b in zip(test, scratch, strict=True)]
        gain = (
            "" if arm == "from scratch" else f"{statistics.mean(gains):+.1%} ({min(gains):+.1%} to {max(gains):+.1%})"
        )
        deviation = statistics.stdev(test) if len(test) > 1 else float("nan")
        spread = f"{min(test):.1%} to {max(test):.1%}"
        lines.append(f"| {arm} | {statistics.mean(test):.1%} | {deviation:.1%} | {spread} | {gain} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("python -m bench.transfer", description="Does self-supervision pay?")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="folder of all runs; goes on there")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm")
    parser.add_argument("--processors", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument(
        "--search", action="store_true", help="try learning rates on the validation instruments instead"
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    instruments = render(
        options.out / "instruments", clips_per_instrument=CLIPS_PER_INSTRUMENT, seed=0, seconds=SECONDS
    )
    print(f"instruments are rendered after {time.perf_counter() - start:.0f} s", flush=True)
    pretrained = options.out / "pretrain"
    seconds = run("audiomae.pretrain", pretrained, {**MODEL, **DECODER, **PRETRAINING, "data": instruments.train})
    print(f"pre-trained in {seconds:.0f} s", flush=True)
    weights = pretrained / "weights.safetensors"
    if options.search:
        search(options.out, instruments, weights, options.processors)
        return
    jobs = []
    for seed in range(options.seeds):
        labelled = draw_labelled(instruments, LABELLED_PER_INSTRUMENT, seed, options.out / f"labelled-{seed}.csv")
        jobs += [(arm, seed, labelled) for arm in ARMS]
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with ThreadPoolExecutor(options.processors) as pool:
        found = pool.map(lambda job: finetune(options.out, instruments, weights, *job, ARMS[job[0]]["base-lr"]), jobs)
        for (arm, seed, _), result in zip(jobs, found, strict=True):
            results[arm].append(result)
            print(f"{arm}, seed {seed}: valid {result['valid']:.4f}, test {result['test']:.4f}", flush=True)
    written = {
        "results": results,
        "model": MODEL | DECODER,
        "pretraining": PRETRAINING,
        "finetuning": FINETUNING,
        "arms": ARMS,
        "labelled clips": LABELLED_PER_INSTRUMENT * sum(1 for _ in instruments.programs["train"]),
        "pre-training seconds": seconds,
        **provenance(torch.device("cpu")),
    }
    (options.out / "transfer.json").write_text(json.dumps(written, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
