"""Short clips of the 128 General MIDI instruments, labelled by family, with whole instruments held out.

    python -m bench.instruments OUT                     # renders 128 x 40 clips and prints what OUT holds
    python -m bench.instruments OUT --clips 10 --seed 1 --soundfont FILE.sf2

Needs fluidsynth and a soundfont (Debian: fluidsynth, fluid-soundfont-gm); a set, once rendered, needs neither.

The label is exact, since it is what the program's number means, and nothing leaks: a program is in one split only, and
so is every recording. Soundfonts use recordings for several programs, which a split by program alone would not see. In
FluidR3_GM.sf2 47 of the 128 programs share some of the 1,050 recordings that are heard here: 53 pairs do, 21 of them
inside a family, as three of the pianos. With 2 of 8 programs of each family drawn for test and 1 for validation, on
average 5.7 of the 32 would sound recordings that a training program of their family sounds too. So programs that share
a recording, by its samples and not by its name, go to one split together, also across families. They form 11 groups of
2 to 14. What that costs: some families have 3 programs in test or 2 in validation, and in guitar, synth pad and synth
effects every seed holds out the same programs for test. TimGM6mb.sf2 cannot be split like that, because 34 of its
programs form one group, all synth pads among them: it is refused.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

from audiomae.data import read_waveform
from audiomae.seeding import clip_generator, epoch_generator
from bench.general_midi import FAMILIES, INSTRUMENTS, LABELS, Note, midi_file
from bench.soundfont import SoundFontError, group_by_recording, read_programs

SAMPLE_RATE = 16_000
SECONDS = 2.575
"""256 frames of ``LogMel``."""

KEYS = range(36, 85)
"""C2 to C6 for every family, so that pitch gives little away; an instrument plays those that it has."""
VELOCITIES = range(40, 128)
SILENT = 10 ** (-50 / 20)
"""Peak below which a clip is drawn anew: 50 dB below full scale."""
DRAWS = 8
"""After which an instrument that is still silent is an error."""

SPLITS = ("train", "valid", "test")
HELD_OUT = {"valid": range(1, 3), "test": range(2, 4)}
"""How many of a family's eight instruments are held out; more than the least only where they share recordings."""

DEFAULT_SOUNDFONT = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
PACKAGES = {"FluidR3_GM.sf2": "fluid-soundfont-gm", "TimGM6mb.sf2": "timgm6mb-soundfont"}
RECORD = "instruments.json"

# fluidsynth does not filter what it plays at a higher pitch, so it renders at a rate where that folds little down.
_RENDER_RATE = 48_000
_GAIN = 0.5
_GAP_MS = 50


@dataclass(frozen=True)
class InstrumentSet:
    """A rendered set: one FLAC file a clip, 16 kHz mono, and a CSV a split that ``read_manifest`` reads.

    Attributes:
        folder: Holds ``train.csv``, ``valid.csv`` and ``test.csv`` with the columns path, label and program, the clips,
            and ``instruments.json``.
        programs: The programs of each split, numbers from 0.
        shared: Groups of programs that share recordings; each is inside one split.
        redrawn: Clips that were silent and drawn anew, counted once a draw.
    """

    folder: Path
    programs: dict[str, tuple[int, ...]]
    shared: tuple[tuple[int, ...], ...]
    redrawn: int

    @property
    def train(self) -> Path:
        """Manifest of the training clips."""
        return self.folder / "train.csv"

    @property
    def valid(self) -> Path:
        """Manifest of the clips to choose a model by."""
        return self.folder / "valid.csv"

    @property
    def test(self) -> Path:
        """Manifest of the clips to report on."""
        return self.folder / "test.csv"


def draw_notes(generator: np.random.Generator, keys: Sequence[int], milliseconds: int) -> list[Note]:
    """Draw what a clip plays: a note, a chord of 2 to 4, or a phrase of 3 to 8 notes, each as often as the others.

    All keys lie within an octave, whose lowest is uniform over ``keys``; velocities are uniform over ``VELOCITIES``.
    The first note starts within the first tenth of the clip, and none is held beyond its end.
    """
    begin = int(generator.integers(milliseconds // 10 + 1))
    lowest = generator.choice(keys)
    octave = [key for key in keys if lowest <= key <= lowest + 12]
    kind = generator.choice(("note", "chord", "phrase"))
    if kind == "phrase":
        count = int(generator.integers(3, 9))
        drawn = generator.choice(octave, count)
        bounds = np.linspace(begin, milliseconds, count + 1).astype(int)
        starts, room = bounds[:-1], np.diff(bounds)
    else:
        count = 1 if kind == "note" else min(int(generator.integers(2, 5)), len(octave))
        drawn = generator.choice(octave, count, replace=False)
        starts, room = np.full(count, begin), np.full(count, milliseconds - begin)
    stops = starts + (room * generator.uniform(0.4, 1, count)).astype(int)
    velocities = generator.integers(VELOCITIES.start, VELOCITIES.stop, count)
    return [Note(*row) for row in np.stack([starts, stops, drawn, velocities], axis=1).tolist()]


def split_programs(groups: Iterable[Sequence[int]], seed: int) -> dict[str, tuple[int, ...]]:
    """Draw which programs are in "train", "valid" and "test": of each family as many as ``HELD_OUT`` says.

    Args:
        groups: All 128 programs in groups that must not be split, as ``group_by_recording`` gives them.
        seed: Of the draw.

    Raises:
        ValueError: If no split keeps every group on one side.
    """
    generator = epoch_generator(seed, 0, "split")
    shuffled = [tuple(group) for group in groups]
    generator.shuffle(shuffled)
    bound = sorted((group for group in shuffled if len(group) > 1), key=len, reverse=True)
    split = _place(bound, dict.fromkeys(SPLITS, ()), generator)
    if split is None:
        names = ", ".join(INSTRUMENTS[program] for program in bound[0][:3])
        wanted = " and ".join(f"{counts[0]} to {counts[-1]} for {name}" for name, counts in HELD_OUT.items())
        raise ValueError(
            f"no split holds out {wanted} of each family's instruments with every recording on one side: "
            f"{len(bound[0])} instruments share some ({names}, ...)"
        )
    for program in (group[0] for group in shuffled if len(group) == 1):
        lacking = [name for name in ("test", "valid") if _count(split[name], LABELS[program]) < HELD_OUT[name][0]]
        split[[*lacking, "train"][0]] += (program,)
    return {name: tuple(sorted(split[name])) for name in SPLITS}


def _place(
    groups: Sequence[tuple[int, ...]], split: dict[str, tuple[int, ...]], generator: np.random.Generator
) -> dict[str, tuple[int, ...]] | None:
    """Add each group to a split such that single programs can complete it; None if there is no way."""
    if not _can_be_completed(split):
        return None
    if not groups:
        return split
    for name in (SPLITS[i] for i in generator.permutation(len(SPLITS))):
        placed = _place(groups[1:], split | {name: split[name] + groups[0]}, generator)
        if placed is not None:
            return placed
    return None


def _can_be_completed(split: Mapping[str, Sequence[int]]) -> bool:
    """Whether the programs not yet placed are enough for every family, and no split has too many."""
    for family in FAMILIES:
        counts = {name: _count(split[name], family) for name in SPLITS}
        lacking = sum(max(0, wanted[0] - counts[name]) for name, wanted in HELD_OUT.items())
        if sum(counts.values()) + lacking > LABELS.count(family):
            return False
        if any(counts[name] > wanted[-1] for name, wanted in HELD_OUT.items()):
            return False
    return True


def _count(programs: Iterable[int], family: str) -> int:
    return sum(LABELS[program] == family for program in programs)


def render(
    folder: Path, *, soundfont: Path | None = None, clips_per_instrument: int, seed: int, seconds: float
) -> InstrumentSet:
    """Render the set, or read it where it has been rendered with the same settings.

    The same settings, soundfont and fluidsynth give the same bytes. To read a set takes neither of the two.

    Args:
        folder: Of the set; must not exist, be empty, or hold such a set.
        soundfont: SoundFont 2 with all programs of General MIDI; ``None`` is ``DEFAULT_SOUNDFONT``.
        clips_per_instrument: Clips of each of the 128 programs.
        seed: Of the notes and of the split.
        seconds: Length of a clip, at least half a second.

    Raises:
        FileNotFoundError: fluidsynth or the soundfont is missing.
        FileExistsError: The folder holds something else, or a set of other settings.
        ValueError: A setting makes no sense, or no split keeps shared recordings on one side.
        SoundFontError: The soundfont cannot be read or lacks programs.
        RuntimeError: fluidsynth fails, or an instrument is silent or too loud.
    """
    if clips_per_instrument < 1 or not 0.5 <= seconds <= 60:
        raise ValueError(
            "expected clips_per_instrument >= 1 and seconds in [0.5, 60], "
            f"got clips_per_instrument={clips_per_instrument} and seconds={seconds}"
        )
    soundfont = soundfont or DEFAULT_SOUNDFONT
    settings: dict[str, str | int | float] = {
        "soundfont": soundfont.name,
        "clips_per_instrument": clips_per_instrument,
        "seed": seed,
        "seconds": seconds,
    }
    if soundfont.exists():
        with soundfont.open("rb") as file:
            settings["soundfont_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if (folder / RECORD).exists():
        return _read_set(folder, settings)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty and without {RECORD}, expected a new folder or a rendered set")
    if not soundfont.exists():
        package = PACKAGES.get(soundfont.name)
        raise FileNotFoundError(
            f"no such soundfont: {soundfont}" + (f"; Debian's package {package} has it" if package else "")
        )
    executable = shutil.which("fluidsynth")
    if executable is None:
        raise FileNotFoundError("no fluidsynth on the path; Debian's package fluidsynth has it")

    programs = read_programs(soundfont, KEYS, VELOCITIES)
    silent = [number for number in range(128) if number not in programs or not programs[number].keys]
    if silent:
        raise SoundFontError(
            f"{soundfont}: no sound for {len(silent)} of 128 programs, the first {INSTRUMENTS[silent[0]]!r}"
        )
    groups = group_by_recording({number: programs[number] for number in range(128)})
    split = split_programs(groups, seed)
    renderer = _Renderer(executable, soundfont.resolve(), clips_per_instrument, seed, seconds)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent.resolve()) as scratch:
        whole = Path(scratch) / "set"  # takes its place only when nothing is missing

        def render_program(number: int) -> int:
            return renderer.render(number, programs[number].keys, whole / f"{number:03d}")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            redrawn = sum(pool.map(render_program, range(128)))
        for name, members in split.items():
            _write_manifest(whole / f"{name}.csv", members, clips_per_instrument)
        record = {
            "settings": settings,
            "programs": split,
            "shared": [group for group in groups if len(group) > 1],
            "redrawn": redrawn,
        }
        (whole / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        whole.rename(folder)
    return _read_set(folder, settings)


def _write_manifest(path: Path, programs: Iterable[int], clips: int) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label", "program"))
        for program in programs:
            rows.writerows((_clip_path(program, clip), LABELS[program], program) for clip in range(clips))


def _clip_path(program: int, clip: int) -> str:
    return f"{program:03d}/{clip:04d}.flac"


def _read_set(folder: Path, settings: Mapping[str, str | int | float]) -> InstrumentSet:
    record = json.loads((folder / RECORD).read_text())
    found = record["settings"]
    differing = [
        f"{name} {found.get(name)}, not {value}" for name, value in settings.items() if found.get(name) != value
    ]
    if differing:
        raise FileExistsError(f"{folder} holds a set with {', '.join(differing)}: name another folder")
    programs = {name: tuple(members) for name, members in record["programs"].items()}
    return InstrumentSet(folder, programs, tuple(map(tuple, record["shared"])), record["redrawn"])


@dataclass(frozen=True)
class _Renderer:
    """Renders the clips of one program after the other."""

    executable: str
    soundfont: Path
    clips: int
    seed: int
    seconds: float

    def render(self, program: int, keys: Sequence[int], folder: Path) -> int:
        """Write the clips of a program as 16-bit FLAC; returns how many were silent and drawn anew."""
        folder.mkdir(parents=True)
        pending = list(range(self.clips))
        redrawn = 0
        for draw in range(DRAWS):
            notes = [
                draw_notes(self._generator(program, clip, draw), keys, round(self.seconds * 1000)) for clip in pending
            ]
            silent = []
            for clip, sound in zip(pending, self._play(program, notes), strict=True):
                peak = sound.abs().max().item()
                if peak < SILENT:
                    silent.append(clip)
                    continue
                if peak > 1:
                    raise RuntimeError(f"{INSTRUMENTS[program]}: clip {clip} peaks at {peak:.2f}, expected at most 1")
                sf.write(folder.parent / _clip_path(program, clip), sound.numpy(), SAMPLE_RATE, subtype="PCM_16")
            if not silent:
                return redrawn
            redrawn += len(silent)
            pending = silent
        raise RuntimeError(f"{INSTRUMENTS[program]}: clip {pending[0]} was silent in each of {DRAWS} draws")

    def _generator(self, program: int, clip: int, draw: int) -> np.random.Generator:
        return clip_generator(self.seed, draw, clip * 128 + program, "notes")

    def _play(self, program: int, clips: Sequence[Sequence[Note]]) -> list[torch.Tensor]:
        """The sound of each clip, (samples,) float32."""
        slot_ms = round(self.seconds * 1000) + _GAP_MS
        with tempfile.TemporaryDirectory() as scratch:
            midi, wav = Path(scratch) / "clips.mid", Path(scratch) / "clips.wav"
            midi.write_bytes(midi_file(program, clips, slot_ms, _GAP_MS))
            command = [self.executable, "-niq", "-f", os.devnull, "-R", "0", "-C", "0", "-g", str(_GAIN)]
            command += ["-r", str(_RENDER_RATE), "-T", "wav", "-O", "float", "-F", str(wav)]
            command += ["-o", "synth.dynamic-sample-loading=1", str(self.soundfont), str(midi)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode != 0 or not wav.exists():
                raise RuntimeError(f"fluidsynth failed with status {done.returncode}: {done.stderr.strip()[-300:]}")
            sound = read_waveform(wav, SAMPLE_RATE)
        starts = [number * slot_ms * SAMPLE_RATE // 1000 for number in range(len(clips))]
        samples = round(self.seconds * SAMPLE_RATE)
        if len(sound) < starts[-1] + samples:
            raise RuntimeError(f"fluidsynth wrote {len(sound)} samples, expected {starts[-1] + samples} at least")
        return [sound[start : start + samples] for start in starts]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m bench.instruments", description="Render General MIDI instruments.")
    parser.add_argument("out", type=Path, help="folder of the set")
    parser.add_argument("--clips", type=int, default=40, help="clips of each of the 128 instruments")
    parser.add_argument("--seed", type=int, default=0, help="of the notes and of the split")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of a clip")
    parser.add_argument("--soundfont", type=Path, help=f"SoundFont 2 with all programs, {DEFAULT_SOUNDFONT} by default")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        made = render(
            options.out,
            soundfont=options.soundfont,
            clips_per_instrument=options.clips,
            seed=options.seed,
            seconds=options.seconds,
        )
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"bench.instruments: {error}")
    took = time.perf_counter() - start
    size = sum(path.stat().st_size for path in made.folder.rglob("*.flac"))
    print(
        f"{made.folder}: {128 * options.clips} clips, {size / 1e6:.0f} MB, in {took:.1f} s; {made.redrawn} drawn anew"
    )
    print(f"instruments by family, {', '.join(SPLITS)}:")
    for family in FAMILIES:
        names = (", ".join(INSTRUMENTS[p] for p in made.programs[split] if LABELS[p] == family) for split in SPLITS)
        print(f"  {family}: {' | '.join(names)}")
    print("instruments that share recordings, each group on one side:")
    for group in made.shared:
        print(f"  {', '.join(INSTRUMENTS[program] for program in group)}")


if __name__ == "__main__":
    main()
