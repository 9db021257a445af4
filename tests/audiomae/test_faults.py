"""What must not harm a run and is never unseen: clips that cannot be read, and losses that are not finite."""

import csv
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from audiomae.data import Manifest
from audiomae.model import AudioMAE
from audiomae.training.config import PretrainConfig
from audiomae.training.distributed import Ranks
from audiomae.training.faults import Faults, report_unread
from audiomae.training.logging import RunLog
from audiomae.training.progress import Progress
from audiomae.training.supervisor import NullSupervisor
from audiomae.training.verdict import Verdict
from tests.audiomae.runs import FLAGS, assert_same_curve, assert_same_run, losses, read_log, run, torchrun, whole

__all__ = ["whole"]


def make_clips(folder: Path, count: int = 60) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(count):
        soundfile.write(folder / f"{number:03d}.wav", 0.1 * noise.standard_normal(12_000), 16_000)


def break_clips(folder: Path) -> dict[str, str]:
    """Break some clips, each in its own way; return what is to be told of each."""
    (folder / "003.wav").write_text("no sound")
    (folder / "010.wav").write_bytes(b"")
    soundfile.write(folder / "017.wav", np.full(12_000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(folder / "024.wav", np.zeros(12_000), 16_000)
    samples, _ = soundfile.read(folder / "031.wav")
    soundfile.write(folder / "031.wav", samples, 16_000, format="FLAC")
    content = (folder / "031.wav").read_bytes()
    (folder / "031.wav").write_bytes(content[: len(content) // 10])
    (folder / "038.wav").unlink()
    (folder / "038.wav").symlink_to("nowhere.wav")
    return {
        "003.wav": "cannot be read as audio",
        "010.wav": "",
        "017.wav": "holds samples that are not finite",
        "024.wav": "silent",
        "031.wav": "cannot be read as audio",
        "038.wav": "No such file or directory",
    }


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_bad_clips_are_skipped_counted_and_named_alike_by_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_clips(tmp_path / "clips")
    expected = break_clips(tmp_path / "clips")
    flags = ["--data", str(tmp_path / "clips"), "--batch-size", "20", "--max-skipped", "0.2", *FLAGS]
    log = run(tmp_path / "one", *flags)
    printed = capsys.readouterr().err
    assert f"skipped {tmp_path / 'clips'}" in printed
    rows = read_table(tmp_path / "one" / "skipped.csv")
    assert {Path(row["path"]).name for row in rows} == expected.keys()
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)
    for row in rows:
        name = Path(row["path"]).name
        assert expected[name] in row["reason"], row
        assert row["path"] not in row["reason"]
        assert int(row["clip"]) == int(name[:3])
    assert log[-1]["skipped"] == len(expected)
    assert all(0 < record["loss"] < 3 for record in log)

    run(tmp_path / "workers", *flags, "--workers", "2", "--accumulation", "3")
    done = torchrun(tmp_path / "ranks", *flags)
    assert done.returncode == 0, done.stderr
    for other in ("workers", "ranks"):
        assert_same_curve(tmp_path / other, tmp_path / "one")
        assert read_table(tmp_path / other / "skipped.csv") == rows

    # A run that goes on knows what the first part of it met.
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoint-last.pt").unlink()
    (tmp_path / "resumed" / "skipped.csv").write_text("step,clip,path,reason\n8,1,later.wav,lost\n")
    run(tmp_path / "resumed", *flags, "--resume", "auto")
    assert_same_run(tmp_path / "resumed", tmp_path / "one")
    assert read_table(tmp_path / "resumed" / "skipped.csv") == rows


def test_too_many_bad_clips_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_clips(tmp_path / "clips")
    break_clips(tmp_path / "clips")
    flags = ["--data", str(tmp_path / "clips"), "--batch-size", "20", "--max-skipped", "0.05", *FLAGS]
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", *flags)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "of the 60 clips of an epoch cannot be read, more than the 5.00% of max_skipped: " in last
    assert f"{tmp_path / 'run' / 'skipped.csv'} names them" in last
    assert len(read_table(tmp_path / "run" / "skipped.csv")) > 3


def test_clips_that_are_all_bad_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_clips(tmp_path / "clips", 3)
    for path in (tmp_path / "clips").iterdir():
        path.write_text("no sound")
    for workers in ("0", "1"):
        with pytest.raises(SystemExit) as end:
            run(tmp_path / workers, "--data", str(tmp_path / "clips"), "--batch-size", "1", "--workers", workers)
        assert end.value.code == 2
        assert "cannot be read as audio" in capsys.readouterr().err.splitlines()[-1]


class SpoilLoss:
    """Makes the loss of some steps not finite."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: int):
        self.steps, self.count, self.forward = steps, 0, AudioMAE.forward
        monkeypatch.setattr(AudioMAE, "forward", lambda model, *args, **kwargs: self(model, *args, **kwargs))

    def __call__(self, model, *args, **kwargs):
        output = self.forward(model, *args, **kwargs)
        self.count += 1
        return output._replace(loss=output.loss * float("inf")) if self.count in self.steps else output


def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SpoilLoss(monkeypatch, 5)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, *FLAGS)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the loss or its gradient is not finite at step 5, with " in last
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-last.pt'}, of step 3" in last
    rows = read_table(tmp_path / "nonfinite.csv")
    assert len(rows) == 42
    assert {row["step"] for row in rows} == {"5"}
    assert rows[0]["path"] in last


def test_a_loss_that_is_not_finite_is_told_when_the_run_is_asked_to_stop_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = SpoilLoss(monkeypatch, 5)

    def forward(model, *args, **kwargs):
        if spoilt.count == 3:  # the verdict on step 4, which knows of it, comes with step 5
            os.kill(os.getpid(), signal.SIGTERM)
        return spoilt(model, *args, **kwargs)

    monkeypatch.setattr(AudioMAE, "forward", forward)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, *FLAGS)
    assert end.value.code == 2
    assert "is not finite at step 5" in capsys.readouterr().err.splitlines()[-1]
    assert {row["step"] for row in read_table(tmp_path / "nonfinite.csv")} == {"5"}


class TwoRanks(Ranks):
    """The first of two ranks, with what the other one sends."""

    def gather(self, value):
        return [value, self.other]


@pytest.mark.parametrize(("spoilt", "named"), [([7], [7]), ([], [2, 3, 7, 8])])
def test_only_clips_that_may_have_spoilt_a_step_are_named(tmp_path: Path, spoilt: list[int], named: list[int]) -> None:
    ranks = TwoRanks(0, 2, 2, torch.device("cpu"))
    object.__setattr__(ranks, "other", ([8, 7], spoilt))
    manifest = Manifest([(f"{number}.wav", ()) for number in range(9)])
    config, progress = PretrainConfig(output_dir=tmp_path, skip_nonfinite=1), Progress()
    with RunLog(tmp_path) as log:
        faults = Faults(config, ranks, manifest, 9, progress)
        faults.judge(Verdict(4, False, 0, [3, 2], []), log, NullSupervisor())
    assert progress.nonfinite == {4: named}
    assert [int(row["clip"]) for row in read_table(tmp_path / "nonfinite.csv")] == named


def test_clips_of_an_evaluation_keep_the_bytes_of_their_names(tmp_path: Path) -> None:
    manifest = Manifest([("a.wav", ()), ("b\udcff.wav", ())], tmp_path)
    assert report_unread({1: "silent"}, manifest, 0.5, "test", tmp_path / "test") == [
        f"1 of the 2 clips of test cannot be read and are left out: {tmp_path}/b\udcff.wav: silent"
    ]
    assert b"/b\xff.wav,silent" in (tmp_path / "test" / "skipped.csv").read_bytes()
    assert report_unread({}, manifest, 0.5, "test", tmp_path / "test") == []
    assert not (tmp_path / "test" / "skipped.csv").exists()


def test_losses_that_are_not_finite_are_left_out_as_often_as_allowed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*FLAGS, "--skip-nonfinite", "2", "--save-steps", "1", "--accumulation", "3")
    with monkeypatch.context() as patched:
        SpoilLoss(patched, 4, 13)  # micro-batches of steps 2 and 5
        log = run(tmp_path / "whole", *flags)
    assert [record["step"] for record in log if record["loss"] is None] == [2, 5]
    torch.testing.assert_close(losses(log[:1]), losses(read_log(whole)[:1]), rtol=1e-5, atol=0)
    assert all(np.isfinite(value) for record in log for name, value in record.items() if value is not None)
    rows = read_table(tmp_path / "whole" / "nonfinite.csv")
    assert [row["step"] for row in rows] == ["2"] * 14 + ["5"] * 14  # of the one micro-batch that was spoilt
    assert "left out, 1 of 2 that may be" in capsys.readouterr().err
    for tensor in load_file(tmp_path / "whole" / "weights.safetensors").values():
        assert tensor.isfinite().all()
    # With other clips, those of an earlier process have no names any more, but count.
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    (tmp_path / "other" / "checkpoint-last.pt").unlink()
    make_clips(tmp_path / "clips", 126)
    run(tmp_path / "other", *flags, "--resume", "auto", "--data", str(tmp_path / "clips"))
    rows = read_table(tmp_path / "other" / "nonfinite.csv")
    assert rows == [{"step": step, "clip": "", "path": ""} for step in ("2", "5")]
    # One more is too many, also for a run that goes on.
    shutil.copytree(tmp_path / "whole", tmp_path / "more")
    (tmp_path / "more" / "checkpoint-last.pt").unlink()
    with monkeypatch.context() as patched:
        SpoilLoss(patched, 1)
        with pytest.raises(SystemExit):
            run(tmp_path / "more", *flags, "--resume", "auto")
    assert "is not finite at step 9" in capsys.readouterr().err.splitlines()[-1]
