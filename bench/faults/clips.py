"""Clips that cannot be read, and losses that are not finite."""

import csv
import math
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import soundfile as sf
from safetensors.torch import load_file

from bench.faults.lab import SMALL, SMALL_STEPS, Lab, run_flags, wait_for_steps
from bench.faults.outcome import Outcome, read_log, read_table
from bench.faults.processes import Command
from bench.faults.stops import check_resumed, resumed_step

CLIPS, RATE = 126, 16_000
"""Clips of the demo, all of which three batches visit, and their sample rate."""
EPOCHS = 4
SETTINGS = (*SMALL, "--epochs", str(EPOCHS))


def sound(seconds: float = 3.0) -> np.ndarray:
    """Some noise."""
    return 0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE))


def write_text(path: Path, lab: Lab) -> None:
    """Text by the name of a sound file."""
    path.write_text("no sound\n" * 100)


def write_nothing(path: Path, lab: Lab) -> None:
    """An empty file."""
    path.touch()


def write_folder(path: Path, lab: Lab) -> None:
    """A folder by the name of a sound file."""
    path.mkdir()


def leave_out(path: Path, lab: Lab) -> None:
    """No file at all."""


def write_nan(path: Path, lab: Lab) -> None:
    """NaN in every tenth of a second."""
    samples = sound()
    samples[lab.draw.randrange(RATE // 10) :: RATE // 10] = math.nan
    sf.write(path, samples, RATE, format="WAV", subtype="FLOAT")


def write_large(path: Path, lab: Lab) -> None:
    """Samples of 1e30, which overflow a spectrogram."""
    sf.write(path, 1e30 * sound(), RATE, format="WAV", subtype="FLOAT")


def write_silence(path: Path, lab: Lab) -> None:
    """Three seconds of zeros."""
    sf.write(path, np.zeros(3 * RATE), RATE, format="WAV")


def write_cut(path: Path, lab: Lab) -> None:
    """A FLAC of which less than the length of a crop is there."""
    sf.write(path, sound(10.0), RATE, format="FLAC")
    content = path.read_bytes()
    path.write_bytes(content[: lab.draw.randrange(100, len(content) // 20)])


def write_cut_wav(path: Path, lab: Lab) -> None:
    """A WAV whose header tells of more samples than there are."""
    sf.write(path, sound(), RATE, format="WAV")
    content = path.read_bytes()
    path.write_bytes(content[: lab.draw.randrange(100, len(content) * 98 // 100)])


def write_cut_header(path: Path, lab: Lab) -> None:
    """A WAV that ends within its header."""
    sf.write(path, sound(), RATE, format="WAV")
    path.write_bytes(path.read_bytes()[: lab.draw.randrange(1, 44)])


BAD: dict[str, tuple[Callable[[Path, Lab], None], str]] = {
    "text": (write_text, "cannot be read as audio"),
    "empty": (write_nothing, "cannot be read as audio"),
    "a folder": (write_folder, "is a folder"),
    "missing": (leave_out, "No such file or directory"),
    "NaN": (write_nan, "holds samples that are not finite"),
    "samples of 1e30": (write_large, "holds a sample of"),
    "silent": (write_silence, "silent"),
    "cut off": (write_cut, ""),
    "a WAV cut off": (write_cut_wav, "cut off, its header tells of"),
    "cut in its header": (write_cut_header, ""),
}
"""What makes each kind of clip, and what must be told of it."""


def make_clips(folder: Path, each: int, lab: Lab) -> dict[str, str]:
    """Write the demo clips with some bad ones in their places, and a list of all; return the kinds of the bad ones."""
    demo = Path(str(resources.files("audiomae.data") / "demo"))
    folder.mkdir()
    names = sorted(path.name for path in demo.glob("*.flac"))
    kinds = dict(zip(lab.draw.sample(names, each * len(BAD)), sorted(BAD) * each, strict=True))
    for name in names:
        if name in kinds:
            BAD[kinds[name]][0](folder / name, lab)
        else:
            shutil.copyfile(demo / name, folder / name)
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path"], *([name] for name in names)])
    return kinds


def bad_clips(lab: Lab, times: int) -> Outcome:
    """Train on clips of which some are bad, so many of each kind: on 1 and 2 ranks, each with 0 and 2 readers."""
    outcome = Outcome()
    kinds = make_clips(lab.folder / "clips", times, lab)
    flags = (*SETTINGS, "--data", str(lab.folder / "clips" / "clips.csv"), "--max-skipped", "0.99")
    runs = {(ranks, workers): lab.folder / f"ranks-{ranks}-workers-{workers}" for ranks in (1, 2) for workers in (0, 2)}
    for (ranks, workers), output in runs.items():
        lab.finish(lab.on(ranks, output, *flags, "--workers", str(workers)))
        for kind in kinds.values():
            outcome.add(kind)
        check_skipped(outcome, output, kinds)
    first = runs[1, 0]
    outcome.same_run(runs[1, 2], first)
    for workers in (0, 2):
        outcome.same_curve(runs[2, workers], first)
    outcome.expect(all(math.isfinite(record["loss"]) for record in read_log(first)), "a loss is not finite")
    if not outcome.lost:
        outcome.keep("every bad clip is named once, with its reason, alike in all four runs")
    return outcome


def check_skipped(outcome: Outcome, output: Path, kinds: dict[str, str]) -> None:
    """Check that a run named each bad clip once, and no other."""
    header, *rows = read_table(output / "skipped.csv") or [[]]
    outcome.expect(header == ["step", "clip", "path", "reason"], f"{output.name}: columns {header}")
    named = sorted(Path(path).name for _, _, path, _ in rows)
    outcome.expect(named == sorted(kinds), f"{output.name}: {len(named)} clips are named, {len(kinds)} are bad")
    for _, _, path, reason in rows:
        expected = BAD[kinds[Path(path).name]][1] if Path(path).name in kinds else ""
        outcome.expect(bool(reason) and expected in reason, f"{output.name}: {path}: {reason}, expected {expected}")


def spoil(lab: Lab, output: Path, visits: list[tuple[int, int]], *flags: str) -> Command:
    """Start pre-training in which the loss of these visits, epochs and clips, is infinite."""
    told = ",".join(f"{epoch}:{clip}" for epoch, clip in visits)
    return lab.start("-m", "bench.faults.spoil", told, *run_flags(output, flags))


def draw_visits(lab: Lab, count: int) -> list[tuple[int, int]]:
    """Draw visits of as many epochs, not of the first one."""
    epochs = sorted(lab.draw.sample(range(1, EPOCHS), count))
    return [(epoch, lab.draw.randrange(CLIPS)) for epoch in epochs]


def nonfinite_loss(lab: Lab, times: int) -> Outcome:
    """Make a loss infinite, and go on without that."""
    outcome = Outcome()
    whole = lab.whole(*SETTINGS)
    names = [row[0] for row in read_table(Path(str(resources.files("audiomae.data") / "demo" / "clips.csv")))[1:]]
    for number in range(times):
        output = lab.folder / f"run-{number}"
        ((epoch, clip),) = draw_visits(lab, 1)
        run = spoil(lab, output, [(epoch, clip)], *SETTINGS)
        outcome.add()
        outcome.expect(run.wait() == 2, f"status {run.process.returncode}, expected 2")
        rows = read_table(output / "nonfinite.csv")[1:]
        named = [row for row in rows if row[1] == str(clip) and Path(row[2]).name == names[clip]]
        outcome.expect(len(named) == 1, f"nonfinite.csv names clip {clip} {len(named)} times, expected once")
        step = rows[0][0] if rows else "?"
        for told in (
            f"not finite at step {step}, with {rows[0][2] if rows else '?'}",
            f"the last good checkpoint is {output / 'checkpoint-last.pt'}, of step {epoch * SMALL_STEPS}",
        ):
            outcome.expect(told in run.last_line, f"not told: {told!r} in {run.last_line!r}")
        end = lab.pretrain(output, *SETTINGS)
        lab.finish(end)
        check_resumed(outcome, resumed_step(end, SMALL_STEPS), epoch * SMALL_STEPS)
        outcome.same_run(output, whole)
    return outcome


def skip_nonfinite(lab: Lab, times: int) -> Outcome:
    """Make two losses infinite in a run that may leave out two, once killed between them, and in one that may not."""
    outcome = Outcome()
    for number in range(times):
        visits = draw_visits(lab, 2)
        flags = (*SETTINGS, "--skip-nonfinite", "2", "--save-steps", "1")
        outputs = {kind: lab.folder / f"{kind}-{number}" for kind in ("whole", "killed", "strict")}
        lab.finish(spoil(lab, outputs["whole"], visits, *flags))
        outcome.add()
        log = read_log(outputs["whole"])
        left_out = [record["step"] for record in log if record["loss"] is None]
        told = sorted({int(row[0]) for row in read_table(outputs["whole"] / "nonfinite.csv")[1:]})
        outcome.expect(len(left_out) == 2 and left_out == told, f"steps {left_out} are left out, {told} told of")
        weights = load_file(outputs["whole"] / "weights.safetensors")
        outcome.expect(all(bool(tensor.isfinite().all()) for tensor in weights.values()), "weights are not finite")

        run = spoil(lab, outputs["killed"], visits, *flags)
        wait_for_steps(run, outputs["killed"], left_out[0] + 1)
        run.kill()
        lab.finish(spoil(lab, outputs["killed"], visits, *flags))
        outcome.same_run(outputs["killed"], outputs["whole"])
        outcome.expect(
            read_table(outputs["killed"] / "nonfinite.csv") == read_table(outputs["whole"] / "nonfinite.csv"),
            "nonfinite.csv of the killed run is another one",
        )
        strict = spoil(lab, outputs["strict"], visits, *flags, "--skip-nonfinite", "1")
        outcome.expect(strict.wait() == 2, f"status {strict.process.returncode} after one too many, expected 2")
        outcome.expect(f"not finite at step {left_out[1]}" in strict.last_line, f"not told: {strict.last_line}")
    return outcome


def divergence(lab: Lab, times: int) -> Outcome:
    """Train at a learning rate that is far too high, and go on at the right one from before it did any harm."""
    outcome = Outcome()
    whole = lab.whole(*SETTINGS)
    for number in range(times):
        output, high = lab.folder / f"run-{number}", f"1e+{lab.draw.randint(18, 30)}"
        run = lab.pretrain(output, *SETTINGS, "--base-lr", high, "--save-steps", "1")
        outcome.add()
        outcome.expect(run.wait() == 2, f"status {run.process.returncode}, expected 2")
        for told in ("not finite at step 3, with ", "lower the learning rate"):
            outcome.expect(told in run.last_line, f"not told: {told!r} in {run.last_line!r}")
        # The rate of the first step is 0, and the second one has done the harm.
        end = lab.pretrain(output, *SETTINGS, "--resume", str(output / "checkpoint-previous.pt"))
        lab.finish(end)
        outcome.expect(f"changed since the checkpoint: base_lr was {high}, is " in end.text, f"not told: {end.text}")
        check_resumed(outcome, resumed_step(end, SMALL_STEPS), 1)
        outcome.same_run(output, whole)
    return outcome
