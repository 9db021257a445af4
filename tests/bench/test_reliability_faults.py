"""Faults that are made on purpose: they are made as they should be, and what judges them can fail."""

import csv
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from audiomae.checkpoints.checksum import save_with_checksum
from audiomae.data import ClipError, read_waveform
from audiomae.training.pretrainer import Pretrainer
from audiomae.training.state import State
from bench.faults import clips, disks, lab, processes, ranks, spoil, stops
from bench.faults.lab import Lab, References
from bench.faults.outcome import SAME_CURVE, SAME_RUN, Outcome, last_step, read_log
from bench.faults.processes import Command, UnexpectedError, alive, children, descendants, ranks_of


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path / "lab", random.Random(0), References(tmp_path / "whole")) as made:
        yield made


def write_run(folder: Path, *, loss: float = 1.0, weight: float = 2.0, skipped: str = "", rate: float = 5.0) -> Path:
    folder.mkdir()
    records = [{"step": step, "loss": loss / step, "clips_per_second": rate, "waiting": rate} for step in (1, 2, 3)]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps({**record, 'time': rate})}\n" for record in records))
    save_file({"a": torch.tensor([1.0, weight]), "b": torch.ones(2)}, folder / "weights.safetensors")
    if skipped:
        (folder / "skipped.csv").write_text(f"step,clip,path,reason\n{skipped}\n")
    return folder


def test_runs_are_the_same_where_only_times_differ(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one", rate=1.0), write_run(tmp_path / "other", rate=2.0)
    outcome = Outcome()
    outcome.same_run(one, other)
    outcome.same_run(one, other)
    outcome.same_curve(one, other)
    assert outcome.lost == []
    assert outcome.kept == [SAME_RUN, SAME_CURVE]
    assert outcome.difference == 0.0


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"loss": 1.0000001}, "the log of one is not that of other"),
        ({"weight": 2.0000002}, "1 of 2 tensors of one differ"),
        ({"skipped": "1,0,a.wav,silent"}, "the skipped.csv of one is not that of other"),
    ],
)
def test_a_difference_in_the_last_bit_is_a_loss(tmp_path: Path, change: dict[str, Any], lost: str) -> None:
    outcome = Outcome()
    outcome.same_run(write_run(tmp_path / "one", **change), write_run(tmp_path / "other"))
    assert outcome.lost == [lost]
    assert outcome.kept == []


def test_curves_may_differ_by_rounding_alone(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole")
    outcome = Outcome()
    outcome.same_curve(write_run(tmp_path / "rounded", loss=1.000005, weight=3.0), whole)
    assert outcome.lost == []
    assert outcome.difference == pytest.approx(5e-6, rel=1e-3)
    outcome.same_curve(write_run(tmp_path / "off", loss=1.00002), whole)
    assert outcome.lost == ["the losses of off differ by 2.0e-05"]
    short = write_run(tmp_path / "short")
    (short / "log.jsonl").write_text("".join((short / "log.jsonl").read_text().splitlines(keepends=True)[:2]))
    outcome = Outcome()
    outcome.same_curve(short, whole)
    assert outcome.lost == ["short logged other steps than whole"]


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    assert (read_log(tmp_path), last_step(tmp_path)) == ([], 0)
    (tmp_path / "log.jsonl").write_text('{"step": 4}\n{"step": 5')
    assert last_step(tmp_path) == 4


def test_a_command_that_ends_too_early_or_never_is_an_error(place: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnexpectedError, match=r"^status 3 before a step: first / second$"):
        place.start("-c", "print('first\\nsecond'); exit(3)").wait_for(lambda: None, "a step")
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    silent = place.start("-c", "import time; time.sleep(60)")
    with pytest.raises(UnexpectedError, match=r"^no a step in 0 s: nothing printed$"):
        silent.wait_for(lambda: None, "a step")
    with pytest.raises(UnexpectedError, match=r"^no end in 0 s: "):
        silent.wait(0.1)
    with pytest.raises(UnexpectedError, match=r"^status 4, expected 0: no good$"):
        place.finish(place.start("-c", "print('no good'); exit(4)"))


FAMILY = """
import os, subprocess, sys, time
child = "import time; time.sleep(60)"
for rank in ("1", "0"):
    subprocess.Popen([sys.executable, "-c", child], env=dict(os.environ, RANK=rank), start_new_session=rank == "1")
print("begun", flush=True)
time.sleep(60)
"""


def test_all_processes_of_a_command_are_known_and_end_with_it(place: Lab) -> None:
    command = place.start("-c", FAMILY)
    command.wait_for_text("begun\n")
    parent = command.process.pid
    assert parent in children(os.getpid())
    family = descendants(parent)
    assert len(family) == 2
    command.wait_for(lambda: len(ranks_of(parent)) == 2, "ranks")  # a child has its variables once it has begun
    assert [ranks_of(parent)[rank] for rank in (1, 0)] == family
    assert all(map(alive, family))
    place.close()
    assert command.process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(map(alive, family)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(UnexpectedError, match=r"^interrupted$"):
        place.start("-c", "")


def test_a_run_to_compare_with_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def pretrain(self: Lab, output: Path, *flags: str) -> Command:
        made.append(flags)
        time.sleep(0.05)
        return self.start("-c", f"exit({len(flags) - 1})")

    monkeypatch.setattr(Lab, "pretrain", pretrain)
    references = References(tmp_path)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(references.whole(["one"]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "whole-1" / "run"] * 3
    for _ in range(2):
        with pytest.raises(UnexpectedError, match=r"^status 1, expected 0: $"):
            references.whole(["one", "more"])
    assert made == [("one",), ("one", "more")]


@dataclass
class Printed:
    text: str


@pytest.mark.parametrize(
    ("said", "step"),
    [
        ("", None),
        ("resumed from /a/checkpoint-last.pt, after epoch 4\n", 12),
        ("resumed from /a/checkpoint-last.pt, after epoch 4 and step 2 of 3 of the next one\n", 14),
    ],
)
def test_where_a_run_goes_on_is_read_from_what_it_says(said: str, step: int | None) -> None:
    assert stops.resumed_step(Printed(said), 3) == step  # type: ignore[arg-type]


def test_a_run_that_goes_on_from_too_early_has_lost_something() -> None:
    outcome = Outcome()
    for resumed, saved in ((None, -1), (None, 0), (5, 5), (6, 5)):
        stops.check_resumed(outcome, resumed, saved)
    assert outcome.lost == []
    stops.check_resumed(outcome, None, 1)
    stops.check_resumed(outcome, 4, 5)
    assert outcome.lost == ["went on after step None, though 1 was saved", "went on after step 4, though 5 was saved"]


@pytest.fixture
def saved(place: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a run that need not be trained."""
    state = State(
        settings={},
        config={},
        model={"weight": torch.randn(50, 7)},
        optimizer={},
        progress={"step": 1},
        steps_per_epoch=3,
        launch={},
        clips="",
    )
    save_with_checksum(vars(state), tmp_path / "checkpoint-last.pt")
    monkeypatch.setattr(Lab, "whole", lambda self, *flags: tmp_path)
    return tmp_path


@pytest.mark.parametrize("scenario", [disks.truncated, disks.flipped])
def test_spoilt_checkpoints_are_refused(
    scenario: Callable[[Lab, int], Outcome], place: Lab, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = scenario(place, 50)
    assert (outcome.times, outcome.lost, outcome.kept) == (50, [], ["every one was refused"])
    monkeypatch.setattr(disks, "read_state", lambda path: None)
    outcome = scenario(place, 5)
    assert len(outcome.lost) == 5
    assert outcome.lost[0].startswith("read as if it were whole: ")
    assert outcome.kept == []


def test_a_disk_that_cannot_be_mounted_is_told(
    place: Lab, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = disks.full_disk(place, 1)
    assert outcome.absent is not None
    assert outcome.absent.startswith("a disk of its own needs the right to mount one: ")
    assert (outcome.times, outcome.lost) == (0, [])


def test_a_disk_is_filled_up_to_a_rest(place: Lab) -> None:
    with disks.small_disk(place.folder / "disk") as reason:
        if reason is not None:
            pytest.skip(reason)
        for name, room in (("part", 100_000), ("all", 0)):
            disks.fill(place.folder / "disk" / name, place.folder / "disk", room)
            free = os.statvfs(place.folder / "disk").f_bavail * os.statvfs(place.folder / "disk").f_frsize
            assert room - 8192 <= free <= room
    assert not (place.folder / "disk" / "part").exists()


def test_bad_clips_are_bad_and_the_others_are_not(place: Lab) -> None:
    kinds = clips.make_clips(folder := place.folder / "clips", 2, place)
    with (folder / "clips.csv").open(newline="") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    assert len(names) == clips.CLIPS
    assert sorted(kinds.values()) == sorted([*clips.BAD] * 2)
    for name in names:
        if kinds.get(name) in (None, "silent"):  # only a crop can be silent
            read_waveform(folder / name, clips.RATE)
            continue
        with pytest.raises(ClipError) as error:
            read_waveform(folder / name, clips.RATE)
        assert clips.BAD[kinds[name]][1] in str(error.value)


@pytest.mark.parametrize(
    ("rows", "lost"),
    [
        (["1,0,/x/a.wav,silent"], None),
        ([], "run: 0 clips are named, 1 are bad"),
        (["1,0,/x/a.wav,silent", "2,0,/x/a.wav,silent"], "run: 2 clips are named, 1 are bad"),
        (["1,0,/x/b.wav,silent"], "run: 1 clips are named, 1 are bad"),
        (["1,0,/x/a.wav,lost"], "run: /x/a.wav: lost, expected silent"),
        (["1,0,/x/a.wav,"], "run: /x/a.wav: , expected silent"),
    ],
)
def test_bad_clips_must_be_named_once_with_their_reason(tmp_path: Path, rows: list[str], lost: str | None) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "skipped.csv").write_text("\n".join(["step,clip,path,reason", *rows]) + "\n")
    outcome = Outcome()
    clips.check_skipped(outcome, tmp_path / "run", {"a.wav": "silent"})
    assert outcome.lost == ([] if lost is None else [lost])


def test_the_losses_of_chosen_visits_are_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pretrainer, "compute_loss", lambda self, data, *, logged: (torch.tensor(2.0), {}))
    spoil.spoil({(2, 17)})
    for visits, loss in (([(2, 16), (2, 17)], float("inf")), ([(1, 17), (2, 16)], 2.0)):
        data = None, torch.tensor(visits)
        assert Pretrainer.compute_loss(Pretrainer.__new__(Pretrainer), data, logged=True)[0] == loss  # type: ignore[arg-type]


def test_spoilt_visits_are_of_the_run(place: Lab) -> None:
    for _ in range(20):
        visits = clips.draw_visits(place, 2)
        assert len({epoch for epoch, _ in visits}) == 2
        assert all(1 <= epoch < clips.EPOCHS and 0 <= clip < clips.CLIPS for epoch, clip in visits)


def test_any_two_settings_meet() -> None:
    pairs = {
        (place, other, combination[place], combination[other])
        for combination in ranks.COMBINATIONS
        for place, other in ((0, 1), (0, 2), (1, 2))
    }
    assert len(pairs) == 27


def test_runs_are_long_enough_for_what_befalls_them() -> None:
    for stops_made in (1, 3, 10, 30):
        assert int(stops.epochs_for(stops_made, lab.SMALL_STEPS)) * lab.SMALL_STEPS > stops_made * (stops.STEPS + 1)
    assert disks.EPOCHS * disks.STEPS_PER_EPOCH > 16
