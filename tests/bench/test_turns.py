"""Turns: who runs when, what a row's ratio is; and what a plan makes of it."""

import time

import pytest
import torch

from bench.compare import Plan, compare, is_compiled
from bench.rows import Row, read_rows, write_rows
from bench.turns import Laps, Turns, spread

CPU = Laps(torch.device("cpu"), kernels=True)
ABOUT = Row("operators", "a task", "ours", "theirs", shape={"batch": 2}, facts={"f": 1})


class Clock:
    """Stands in for Laps: a call returns its own milliseconds."""

    def time(self, call, turn):
        return call(turn, lambda name: None)


def test_the_first_ends_every_round_and_the_others_move_on():
    order = []

    def call(name):
        return lambda turn, mark: order.append((name, turn))

    Turns({name: call(name) for name in "abcd"}, CPU).run(3)
    assert "".join(name for name, _ in order) == "bcdacdbadbca"
    assert [turn for _, turn in order] == [0] * 4 + [1] * 4 + [2] * 4


def test_ratios_are_taken_round_by_round():
    ours, theirs = [1.0, 2.0, 4.0, 1.0, 1.0], [3.0, 4.0, 4.0, 2.0, 10.0]
    turns = Turns(
        {"ours": lambda turn, mark: {"all": ours[turn]}, "theirs": lambda turn, mark: {"all": theirs[turn]}}, Clock()
    )
    turns.run(5)
    timing = turns.timing("ours", "theirs", "all")
    assert timing.ratio == 2.0  # of 3, 2, 1, 2, 10: the quotient of medians would be 4
    assert (timing.ratio_p20, timing.ratio_p80) == spread([3.0, 2.0, 1.0, 2.0, 10.0])[::2]
    assert (timing.p50, timing.rounds) == (1.0, 5)
    assert turns.timing("theirs", "theirs", "all").ratio == 1


def test_parts_are_timed_between_marks_and_add_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(turn, mark):
        for seconds, name in ((0.25, "forward"), (0.5, "backward"), (0.125, "forward")):
            now[0] += seconds
            mark(name)
        now[0] += 1

    assert CPU.time(call, 0) == {"forward": 375, "backward": 500, "all": 1875}


class FakeGPU:
    """A GPU whose clock moves by what is queued on it, and a host on which nothing takes time."""

    def __init__(self, monkeypatch):
        self.now, self.slept = 0.0, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, other):
                return other.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append)

    def call(self, turn, mark):
        self.now += 2000.0
        mark("forward")
        self.now += 3000.0
        mark("backward")


def test_kernels_are_timed_by_events_behind_a_spin(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    laps = Laps(torch.device("cuda"), kernels=True)
    for turn in range(3):
        assert laps.time(gpu.call, turn) == {"forward": 2000, "backward": 3000, "all": 5000}
    assert len(gpu.slept) == 2  # the first call has not been seen before
    assert all(0 <= cycles <= 0.05 * 2e9 for cycles in gpu.slept)


def test_a_step_on_a_gpu_takes_what_the_host_waits(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    times = Laps(torch.device("cuda"), kernels=False).time(gpu.call, 0)
    assert (times["forward"], times["backward"]) == (2000, 3000)
    assert times["all"] < 2000
    assert gpu.slept == []


def test_spread_of_few_values():
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)


def test_a_row_for_each_provider_and_mode():
    calls = {
        "theirs": lambda turn, mark: {"all": 4.0, "forward": 3.0},
        "ours": lambda turn, mark: {"all": 2.0, "forward": 1.0},
    }
    rows = compare(Plan(short=True), ABOUT, calls, Clock(), modes=("forward", "all"))
    assert [(row.provider, row.mode, row.p50_ms, row.ratio, row.rounds) for row in rows] == [
        ("theirs", "forward", 3.0, 1.0, 3),
        ("theirs", "both", 4.0, 1.0, 3),
        ("ours", "forward", 1.0, 3.0, 3),
        ("ours", "both", 2.0, 2.0, 3),
    ]
    assert {row.task for row in rows} == {"a task"}
    rows[0].facts["f"] = 2
    assert rows[1].facts == {"f": 1}


@pytest.mark.parametrize(("round_ms", "rounds"), [(1, 41), (1000, 10), (60_000, 5)])
def test_rounds_fit_the_budget(round_ms, rounds):
    turns = Turns({"ours": lambda turn, mark: {"all": round_ms}}, Clock())
    Plan().run(turns, budget_s=10)
    assert len(turns.samples["ours"]) == rounds


def test_the_baseline_is_reported_where_the_provider_is_wrong():
    calls = {"theirs": lambda turn, mark: {"all": 4.0}}
    (row,) = compare(Plan(short=True), ABOUT, calls, Clock(), fields={"theirs": {"peak_mib": 2.0}})
    assert (row.provider, row.ratio, row.peak_mib) == ("theirs", 1.0, 2.0)


def test_pytest_benchmark_runs_the_rounds():
    ran = []

    def pedantic(target, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            ran.append(target)
            target()

    rows = compare(
        Plan(short=True, pedantic=pedantic),
        ABOUT,
        {"theirs": lambda turn, mark: {"all": 4.0}, "ours": lambda turn, mark: {"all": 2.0}},
        Clock(),
    )
    assert len(ran) == 3
    assert [row.ratio for row in rows] == [1.0, 2.0]


def test_what_is_compiled():
    assert is_compiled("fused + compile")
    assert is_compiled("reference + max-autotune")
    assert not is_compiled("fused")
    assert set(Plan(full=True).compiler_modes(torch.device("cpu"))) == {" + compile"}


def test_rows_are_written_and_read(tmp_path):
    rows = [
        Row("steps", "a", "fused", "reference", p50_ms=1 / 3, facts={"clips/s": 2 / 3}, about={"device": "x"}),
        Row("steps", "b", "fa3", "reference", absent="flash-attn 3 is not installed"),
    ]
    write_rows(tmp_path / "deep" / "rows.json", rows)
    first, second = read_rows([tmp_path / "deep" / "rows.json"])
    assert (first.p50_ms, first.facts, first.ratio) == (0.33333, {"clips/s": 0.66667}, None)
    assert second == rows[1]


@pytest.mark.parametrize("text", ["{", "[1]", '[{"suite": "steps"}]', '[{"no": 1}]'])
def test_a_file_without_rows(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json holds no rows of results"):
        read_rows([tmp_path / "x.json"])
