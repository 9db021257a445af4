"""The command that makes faults befall runs: what it writes down, and the page that it makes of that."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import reliability
from bench.faults.lab import Lab
from bench.faults.outcome import SAME_CURVE, Outcome
from bench.faults.page import load, make_page
from bench.faults.processes import UnexpectedError, children
from bench.faults.scenarios import LONGEST, SCENARIOS, Scenario

ABOUT = {"device": "a CPU", "cores": 2, "python": "3.11", "torch": "2.11", "commit": "abc", "date": "2026-01-02"}


def test_faults_have_names_of_their_own() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
    assert set(LONGEST) <= set(names)
    assert all(0 < scenario.few <= scenario.times for scenario in SCENARIOS)


def lose(place: Lab, times: int) -> Outcome:
    outcome = Outcome()
    for turn in range(times):
        outcome.add(("odd", "even")[turn % 2])
    outcome.expect(False, "a | step")
    return outcome


def keep(place: Lab, times: int) -> Outcome:
    return Outcome(times=times, kept=["all of it", SAME_CURVE], difference=1.2345e-7)


def fail(place: Lab, times: int) -> Outcome:
    place.start("-c", "import time; time.sleep(60)")
    raise UnexpectedError("no end in 300 s:\nnothing printed")


def skip(place: Lab, times: int) -> Outcome:
    return Outcome(absent="no root")


def interrupt(place: Lab, times: int) -> Outcome:
    command = place.start("-c", "import time; time.sleep(60)")
    os.kill(os.getpid(), signal.SIGINT)
    command.wait()
    return Outcome()


def scenario(play: Callable[[Lab, int], Outcome]) -> Scenario:
    return Scenario(play.__name__, f"fault {play.__name__}", "by hand", 3, 1, play)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "SCENARIOS", tuple(map(scenario, (lose, keep, fail, skip))))
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)


def play(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        reliability.main(arguments)
    return end.value.code


def test_results_become_a_page(
    played: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play("--out", str(tmp_path / "results" / "a.json"), "--folder", str(tmp_path / "runs"), "--seed", "7") == 1
    printed = capsys.readouterr().err
    assert "2 of 4 faults cost nothing" in printed
    assert f"keep: nothing lost, all of it, {SAME_CURVE} (0 s)" in printed
    content = json.loads((tmp_path / "results" / "a.json").read_text())
    assert content["command"].startswith("python -m bench.reliability --out ")
    assert content["seed"] == 7
    assert {"device", "torch", "commit", "date"} <= content["about"].keys()
    assert [row["name"] for row in content["faults"]] == ["lose", "keep", "fail", "skip"]
    assert content["faults"][0]["kinds"] == {"odd": 2, "even": 1}

    monkeypatch.chdir(tmp_path)
    reliability.main(["--page", "docs/reliability.md", "--results", "results/a.json"])
    page = (tmp_path / "docs" / "reliability.md").read_text()
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in page.splitlines() if line[:1] == "|"
    }
    assert rows["fault lose"] == [
        *("by hand", "3: 1 x even, 2 x odd", "**failed**: a \\| step", "`python -m bench.reliability lose` |")
    ]
    assert rows["fault keep"][1:3] == ["3", f"nothing: all of it, {SAME_CURVE} (at most 1.2e-07 apart)"]
    assert rows["fault fail"][2] == (
        "**failed**: not played to its end: UnexpectedError: no end in 300 s: nothing printed"
    )
    assert rows["fault skip"][1:3] == ["", "not run here: no root"]
    assert "\n2 of 4 rows failed.\n" in page
    assert "`python -m bench.reliability --page docs/reliability.md --results results/a.json`" in page
    assert f"commit `{content['about']['commit']}`, {content['about']['date']}" in page


def test_some_faults_can_be_made_so_often(played: None, tmp_path: Path) -> None:
    assert play("keep", "--times", "5", "--out", str(tmp_path / "a.json")) == 0
    assert play("keep", "--short", "--out", str(tmp_path / "b.json")) == 0
    times = [json.loads((tmp_path / name).read_text())["faults"][0]["times"] for name in ("a.json", "b.json")]
    assert times == [5, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "keep"], "unknown faults nothing: expected some of lose, keep, fail, skip"),
        (["--times", "0"], "--times and --jobs must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(
    played: None, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(*arguments) == 2
    assert said in capsys.readouterr().err


def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        reliability.play_all([(scenario(interrupt), 1), (scenario(keep), 1)], tmp_path, 0, 1)
    assert not [child for child in children(os.getpid()) if b"time.sleep(60)" in command_line(child)]


def command_line(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def record(name: str = "one", **changes: Any) -> dict[str, Any]:
    row = {"name": name, "fault": name, "how": "", "command": "c", "times": 1, "kinds": {}, "lost": [], "kept": ["all"]}
    return {
        "command": "c",
        "seconds": 60,
        "about": ABOUT,
        "faults": [{**row, "difference": None, "absent": None, **changes}],
    }


def fuzz_figures(**outcomes: int) -> dict[str, Any]:
    test = {"inputs": sum(outcomes.values()), "outcomes": outcomes, "slowest_s": 0.25, "largest_mib": 30}
    tests = {"wav_headers": test, "label_files": {**test, "slowest_s": 1.5}}
    return {
        "command": "pytest tests/fuzz",
        "seed": 5,
        "hypothesis": "6.1",
        "inputs": 2 * test["inputs"],
        "tests": tests,
    }


def test_fuzzing_is_a_row() -> None:
    page = make_page([record()], [fuzz_figures(result=1000, ClipError=20)], "c")
    assert "Nothing was lost in any of 2 rows." in page
    assert "| 2,040: 1,020 wav headers, 1,020 label files |" in page
    assert "nothing: 2,000 results, and refusals of one line: 40 ClipError; the slowest took 1.5 s, the largest" in page
    assert "from seed 5" in page
    page = make_page([record()], [fuzz_figures(result=10, crashed=1)], "c")
    assert "| **failed**: 2 crashed |" in page
    assert "1 of 2 rows failed." in page


def test_long_losses_are_cut_short() -> None:
    page = make_page([record(lost=["word " * 200, *"bcde"])], [], "c")
    (line,) = [line for line in page.splitlines() if "**failed**" in line]
    assert "word ...; b; c and 2 more |" in line
    assert len(line) < 450


def test_files_that_are_no_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text(json.dumps(record("sigkill")))
    other.write_text(json.dumps(record("sigkill")))
    with pytest.raises(ValueError, match=r"^sigkill: in two of the files, expected each fault once$"):
        load([one, other])
    for content in ("{", "[]", "{}", '{"faults": 3}'):
        other.write_text(content)
        with pytest.raises(ValueError, match=r"other\.json holds no results"):
            load([one, other])
    monkeypatch.chdir(tmp_path)
    assert str(play("--page", "page.md")).startswith("bench.reliability: no results in bench/results/reliability: ")
    assert not Path("page.md").exists()
