import inspect
import io
import json
import math
import os
import pty
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from audiomae.training import logging
from audiomae.training.logging import NullLog, RunLog

TOTAL = {"total_steps": 60, "steps_per_epoch": 20, "epochs": 3}


def draw_values(generator: random.Random) -> dict[str, float]:
    names = ("loss", "lr", "clips_per_second", "waiting", "baseline_loss")
    return {"skipped": generator.randrange(9), **{name: generator.lognormvariate(0, 3) for name in names}}


def log_steps(directory, steps, seed: int, first_step: int = 0) -> dict[int, dict[str, float]]:
    """Log random values at some steps of one process; return them by step."""
    generator = random.Random(seed)
    logged = {}
    with RunLog(directory) as log:
        log.start(first_step=first_step, **TOTAL)
        for step in steps:
            logged[step] = {"epoch": -(-step // TOTAL["steps_per_epoch"]), **draw_values(generator)}
            log.step(step=step, **logged[step])
            log.advance(step)
    return logged


def read_records(directory) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def read_tensorboard(directory) -> EventAccumulator:
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def test_every_logged_step_is_a_line_at_once(tmp_path):
    values = draw_values(random.Random(1))
    before = time.time()
    with RunLog(tmp_path / "new" / "run") as log:
        log.start(first_step=0, **TOTAL)
        log.step(step=3, epoch=1, **values)
        (record,) = read_records(tmp_path / "new" / "run")
    assert before - 1e-3 <= record.pop("time") <= time.time() + 1e-3
    assert record == {"step": 3, "epoch": 1, **values}


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with RunLog(tmp_path) as log:
        log.start(first_step=0, **TOTAL)
        log.step(step=1, epoch=1, loss=math.nan, lr=0.1, clips_per_second=math.inf, waiting=math.nan, norm=-math.inf)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    names = ("loss", "lr", "clips_per_second", "waiting", "norm")
    assert [record[name] for name in names] == [None, 0.1, None, None, None]


@pytest.mark.parametrize("resumed", [0, 20, 40, 60])
def test_a_resumed_record_is_one_record(tmp_path, capfd, resumed):
    first = log_steps(tmp_path, range(7, 48, 5), seed=1)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 52, "lo')  # where the process was killed
    capfd.readouterr()
    second = log_steps(tmp_path, range(resumed + 3, 61, 9), seed=2, first_step=resumed)

    expected = {step: values for step, values in first.items() if step <= resumed} | second
    records = read_records(tmp_path)
    assert [record["step"] for record in records] == list(expected)
    for record in records:
        assert record["time"] > 0
        assert {name: record[name] for name in expected[record["step"]]} == expected[record["step"]]
    dropped = sum(step > resumed for step in first) + 1
    assert f"dropped {dropped} line{'s' if dropped > 1 else ''} after step {resumed}\n" in capfd.readouterr().err

    events = read_tensorboard(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        "epoch",
        "loss",
        "lr",
        "clips_per_second",
        "waiting",
        "skipped",
        "baseline_loss",
    }
    for name in events.Tags()["scalars"]:
        drawn = {event.step: event.value for event in events.Scalars(name)}
        assert drawn == {step: np.float32(values[name]) for step, values in expected.items()}


@pytest.mark.parametrize("line", ["a text", "[1, 2]", '{"loss": 1.0}', '{"step": null}'])
def test_a_log_of_another_kind_is_left_alone(tmp_path, line):
    log_steps(tmp_path, [1, 2], seed=1)
    path = tmp_path / "log.jsonl"
    content = path.read_text() + line + "\n" + '{"step": 4}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"log.jsonl:3: expected a JSON object with a step, found .{re.escape(line)}"):
        log_steps(tmp_path, [3], seed=2, first_step=2)
    assert path.read_text() == content


@pytest.mark.parametrize("step", [10, 15, 9])
def test_steps_must_ascend(tmp_path, step):
    with RunLog(tmp_path) as log:
        log.start(first_step=10, **TOTAL)
        if step != 10:
            log.step(step=15, epoch=1, loss=1.0, lr=1.0, clips_per_second=1.0, waiting=0.0)
        with pytest.raises(ValueError, match=f"step is {step}, expected one after {15 if step != 10 else 10}"):
            log.step(step=step, epoch=1, loss=1.0, lr=1.0, clips_per_second=1.0, waiting=0.0)


@pytest.mark.parametrize("value", [torch.ones(()), np.float32(1), "1", None])
def test_values_must_be_numbers(tmp_path, value):
    with RunLog(tmp_path) as log:
        log.start(first_step=0, **TOTAL)
        with pytest.raises(TypeError, match=r"norm is of .*, expected a Python number"):
            log.step(step=1, epoch=1, loss=1.0, lr=1.0, clips_per_second=1.0, waiting=0.0, norm=value)
    assert read_records(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^cannot write the log of a run to .*file.run: Not a directory$"):
        RunLog(tmp_path / "file" / "run").__enter__()


def test_pictures_become_files_and_images(tmp_path):
    pixels = {}
    with RunLog(tmp_path) as log:
        log.start(first_step=0, **TOTAL)
        for step, colour in ((40, "red"), (47, "blue")):
            figure = Figure(figsize=(3, 2), dpi=50, facecolor=colour)
            log.picture("reconstruction", figure, step)
            pixels[step] = np.broadcast_to([255, 0, 0] if colour == "red" else [0, 0, 255], (100, 150, 3))
    names = {"reconstruction-epoch-0002.png": 40, "reconstruction-step-0000047.png": 47}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names.keys()
    for name, step in names.items():
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "pictures" / name).convert("RGB")), pixels[step])
    images = read_tensorboard(tmp_path).Images("reconstruction")
    assert [image.step for image in images] == [40, 47]
    for image in images:
        np.testing.assert_array_equal(
            np.array(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")), pixels[image.step]
        )


def test_the_null_log_takes_the_same_calls(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    public = {name for name, _ in inspect.getmembers(RunLog, inspect.isfunction) if not name.startswith("_")}
    assert public == {name for name, _ in inspect.getmembers(NullLog, inspect.isfunction) if not name.startswith("_")}
    with NullLog() as log:
        log.start(first_step=0, **TOTAL)
        log.message("text")
        log.step(step=1, epoch=1, loss=1.0, lr=1.0, clips_per_second=1.0, waiting=0.0, norm=2.0)
        log.advance(1)
        log.picture("tag", Figure(), 1)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


class Clock:
    """Stands for the time module, with a time that tests set."""

    time = staticmethod(time.time)

    def __init__(self):
        self.now = 1e6

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logging, "time", clock)
    return clock


def test_a_file_gets_a_line_now_and_then(tmp_path, capfd, clock):
    with RunLog(tmp_path) as log:
        log.message("a long line " * 20)
        log.start(first_step=0, total_steps=300, steps_per_epoch=100, epochs=3)
        for step in range(1, 201):
            clock.now += 0.4
            if step % 5 == 0:
                log.step(step=step, epoch=9, loss=step / 8, lr=2e-4, clips_per_second=1234.4, waiting=0.126, norm=0.25)
            log.advance(step)
    message, *lines = capfd.readouterr().err.splitlines()
    assert message == "a long line " * 20
    # Logged steps are 2 s apart. Epochs end at steps 100 and 200; 10 s, counted from the line before, is 25 steps.
    assert [int(re.search(r"step (\d+)/300 ", line)[1]) for line in lines] == [
        5,
        *range(30, 100, 25),
        100,
        125,
        150,
        175,
        200,
    ]
    assert lines[-1] == (
        "epoch 2/3  step 200/300  loss 25.0000  lr 2.00e-04  1,234 clips/s  waiting 13%  norm 0.25"
        "  elapsed 0:01:20  ETA 0:00:40"
    )


def test_the_last_logged_step_is_shown_when_the_log_closes(tmp_path, capfd, clock):
    def run():
        with RunLog(tmp_path) as log:
            log.start(first_step=0, **TOTAL)
            for step in (1, 2, 3):
                log.step(step=step, epoch=1, loss=1.0, lr=1.0, clips_per_second=1.0, waiting=0.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert re.findall(r"step (\d)", capfd.readouterr().err) == ["1", "3"]


@pytest.mark.parametrize("seconds", [0.01, 0.7, 90.0])
def test_the_time_left_follows_recent_speed(clock, seconds):
    pace = logging._Pace(total_steps=100_000)
    clock.now += 600  # the first step is compiled
    assert pace.advance(1) is None
    for step in range(2, 5000):
        clock.now += 3 * seconds
        pace.advance(step)
    for step in range(5000, 15_000):
        clock.now += seconds
        left = pace.advance(step)
    assert left == pytest.approx(seconds * (100_000 - step), rel=1e-6)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-:--:--"), (0, "0:00:00"), (59.7, "0:01:00"), (360_061, "100:01:01")]
)
def test_clock(seconds, text):
    assert logging._clock(seconds) == text


@contextmanager
def terminal(monkeypatch) -> Iterator[list[bytes]]:
    """Make standard error a terminal of 80 columns; the list has all that was written to it once this is left."""
    master, slave = pty.openpty()
    written = []

    def read():
        try:
            while data := os.read(master, 4096):
                written.append(data)
        except OSError:  # Linux's way to say that the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, os.fdopen(slave, "w") as stderr:
        patch.setattr(sys, "stderr", stderr)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", "80")
        yield written
    reader.join()
    os.close(master)


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch, capsys):
    with terminal(monkeypatch) as written, RunLog(tmp_path) as log:
        log.start(first_step=20, **TOTAL)
        for step in range(21, 45):
            log.step(step=step, epoch=2, loss=step / 8, lr=2e-4, clips_per_second=1234.4, waiting=0.126)
            log.advance(step)
            if step == 30:
                log.message("[saved] a file")
                print("not for the terminal")
    assert capsys.readouterr().out == "not for the terminal\n"
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(written).decode())
    assert "[saved] a file\r\n" in output
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines()]
    assert max(map(len, lines)) == 80
    assert re.fullmatch(r"epoch 2/3 [━╸╺ ]+ 20/60 0:00:0\d ETA -:--:--", lines[0])
    bar, values = [line for line in lines if line][-2:]
    assert re.fullmatch(r"epoch 3/3 [━╸╺ ]+ 44/60 0:00:0\d ETA 0:00:0\d", bar)
    assert values == "loss 5.5000  lr 2.00e-04  1,234 clips/s  waiting 13%"


def test_nothing_heavy_is_loaded_before_it_is_needed(tmp_path):
    """Nor does TensorBoard load TensorFlow, which prints and takes a GPU's memory, where it is installed."""
    (tmp_path / "tensorflow.py").write_text("print('noise of tensorflow')")
    script = """
import sys
from audiomae.training.logging import RunLog
heavy = {"matplotlib", "tensorboard", "torch.utils.tensorboard"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
with RunLog("run") as log:
    log.start(total_steps=2, first_step=0, steps_per_epoch=1, epochs=2)
    log.step(step=1, epoch=1, loss=1.0, lr=1.0, clips_per_second=1.0, waiting=0.0)
    assert "matplotlib" not in sys.modules
    from matplotlib.figure import Figure
    log.picture("tag", Figure(), 1)
assert "matplotlib.pyplot" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(r"epoch 1/2  step 1/2  .*\n", result.stderr), result.stderr
