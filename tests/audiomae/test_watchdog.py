"""What ends runs whose ranks die, stop or hang, and what is told of it."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from audiomae.training.rollcall import COMPUTING
from audiomae.training.store import open_store
from audiomae.training.watchdog import Watchdog, lost_rank
from tests.audiomae.lockstep import PROCESSES, RANKS, TIMEOUT, Group, Outcome, Run, burn


def killed(folder: Path) -> Outcome:
    with Group(Run(folder, "kill")) as group:
        return group.outcome()


def stopped(folder: Path) -> Outcome:
    with Group(Run(folder, "stop", timeout=9.5)) as group:  # dead after 5 s, long before the run counts as hung
        return group.outcome(stuck=1)


def hung(folder: Path) -> Outcome:
    with Group(Run(folder, "hang")) as group:
        return group.outcome()


def hung_anywhere(folder: Path) -> Outcome:
    with Group(Run(folder, "hang", doing=COMPUTING)) as group:
        return group.outcome()


def hung_alone(folder: Path) -> Outcome:
    with Group(Run(folder, "hang", rank=0), world_size=1) as group:
        return group.outcome()


def failed(folder: Path) -> Outcome:
    with Group(Run(folder, "raise", rank=2)) as group:
        return group.outcome()


def continued(folder: Path) -> Outcome:
    """All ranks are stopped for longer than their patience."""
    with Group(Run(folder, steps=20, pause=0.1)) as group:
        group.wait_for_steps()
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in group.ranks:
                os.kill(process.pid, number)
            if number == signal.SIGSTOP:
                time.sleep(TIMEOUT + 2.5)
        return group.outcome()


def busy(folder: Path) -> Outcome:
    """Nothing happens, for longer than the patience, on processors that others want too."""
    burners = [PROCESSES.Process(target=burn, daemon=True) for _ in range(2 * (os.cpu_count() or 1))]
    for burner in burners:
        burner.start()
    try:
        with Group(Run(folder, steps=50, pause=0.1)) as group:
            return group.outcome()
    finally:
        for burner in burners:
            burner.kill()


def store_killed(folder: Path) -> Outcome:
    with Group(Run(folder, steps=80, pause=0.1)) as group:
        group.wait_for_steps()
        group.keeper.kill()
        return group.outcome()


def store_stopped(folder: Path) -> Outcome:
    """It answers no request, and a rank hangs."""
    with Group(Run(folder, "hang", timeout=5.5)) as group:
        group.wait_for_steps()
        os.kill(group.keeper.pid, signal.SIGSTOP)
        return group.outcome()


def keeper_killed(folder: Path) -> Outcome:
    """Without torchrun, rank 0 keeps the store."""
    with Group(Run(folder, "kill", rank=0, agent=False)) as group:
        return group.outcome()


def restarted(folder: Path) -> Outcome:
    """A second attempt with fewer ranks finds the store as the first one, of which a rank was killed, left it."""
    with Group(Run(folder, "kill")) as group:
        assert group.outcome().codes == [2, -signal.SIGKILL, 2]
        for file in folder.glob("*.err"):
            file.unlink()
        group.run, group.world_size = Run(folder), 2
        group.start()
        return group.outcome()


SCENARIOS: tuple[Callable[[Path], Outcome], ...] = (
    *(killed, stopped, hung, hung_anywhere, hung_alone, failed),
    *(continued, busy, store_killed, store_stopped, keeper_killed, restarted),
)


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Callable[[Path], Outcome]], Outcome]]:
    """Play all scenarios at once, since they mostly wait."""
    PROCESSES.set_forkserver_preload([Run.__module__])
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        outcomes = {scenario: pool.submit(scenario, folder / scenario.__name__) for scenario in SCENARIOS}
        yield lambda scenario: outcomes[scenario].result()


def seconds(text: str) -> float:
    return float(re.search(r"for (\d+) s", text)[1])


def test_a_killed_rank_is_named_once(play):
    outcome = play(killed)
    assert outcome.codes == [2, -signal.SIGKILL, 2]
    (line,) = outcome.lines
    rest = line.partition("): ")[2]
    assert rest.startswith(f"{outcome.who(1)}: no sign of life for ")
    assert rest.endswith(" s, last seen at step 3, waiting for data")
    assert not outcome.traces


def test_a_stopped_rank_is_named_though_nothing_fails(play):
    outcome = play(stopped)
    assert outcome.codes == [1, None, 1]
    (line,) = outcome.lines
    assert line.startswith(f"audiomae: error: {outcome.who(1)}: no sign of life for ")
    assert 5 <= seconds(line) < 9.5
    assert "last seen at step 3, waiting for data; stack traces are in " in line
    assert line.endswith(
        "/report/hang-rank-*.txt; --resume auto goes on after the last save; "
        "--hang-timeout SECONDS changes the patience of 9.5 s"
    )
    assert sorted(outcome.traces) == [0, 2]
    assert "in all_reduce" in outcome.traces[0]


def test_of_ranks_that_stand_still_the_one_that_waits_for_none_is_named(play):
    outcome = play(hung)
    assert outcome.codes == [1, 1, 1]
    (line,) = outcome.lines
    named = rf"audiomae: error: the run hangs: {re.escape(outcome.who(1))}: waiting for data at step 3 for \d+ s; stack"
    assert re.match(named, line)
    assert seconds(line) >= TIMEOUT
    assert sorted(outcome.traces) == [0, 1, 2]
    assert "in befall" in outcome.traces[1]
    for rank in range(RANKS):
        assert f"\n{outcome.who(rank)}: " in outcome.traces[rank]


def test_where_it_may_be_any_rank_all_are_named(play):
    outcome = play(hung_anywhere)
    assert outcome.codes == [1, 1, 1]
    (line,) = outcome.lines
    assert line.startswith(
        f"audiomae: error: the run hangs at one of these: {outcome.who(0)}: computing at step 3 for "
    )
    assert f"; {outcome.who(1)}: computing at step 3 for " in line
    assert "in befall" in outcome.traces[1]


def test_a_run_of_one_process_ends_too(play):
    outcome = play(hung_alone)
    assert outcome.codes == [1]
    (line,) = outcome.lines
    assert line.startswith(f"audiomae: error: the run hangs: {outcome.who(0)}: waiting for data at step 3 for ")
    assert "in befall" in outcome.traces[0]


def test_the_others_know_what_a_rank_failed_with(play):
    outcome = play(failed)
    assert outcome.codes == [2, 2, 1]
    (line,) = outcome.lines
    assert line.endswith(f"): {outcome.who(2)}: ended at step 3, waiting for data: OSError: a.wav")


@pytest.mark.parametrize("scenario", [continued, busy])
def test_no_false_alarm(play, scenario):
    outcome = play(scenario)
    assert outcome.codes == [0, 0, 0]
    assert not outcome.lines
    assert not outcome.traces


def test_a_run_goes_on_without_its_store(play):
    outcome = play(store_killed)
    assert outcome.codes == [0, 0, 0]
    (line,) = outcome.lines
    assert re.fullmatch(
        r"audiomae: the store at 127\.0\.0\.1:\d+ does not answer: the torchrun that keeps it, or its machine, is gone "
        r"or stopped; the run goes on, but a rank that hangs would not be named",
        line,
    )


def test_a_run_that_hangs_without_its_store_ends(play):
    outcome = play(store_stopped)
    assert outcome.codes == [1, 1, 1]
    errors = [line for line in outcome.lines if line.startswith("audiomae: error: ")]
    # Nobody knows who speaks for all.
    assert len(errors) == RANKS
    for rank, line in enumerate(errors):
        assert line.startswith(f"audiomae: error: {outcome.who(rank)}: ")
        assert ", and the store at 127.0.0.1:" in line
    assert "in befall" in outcome.traces[1]


def test_a_killed_rank_that_kept_the_store_is_named(play):
    outcome = play(keeper_killed)
    assert outcome.codes == [-signal.SIGKILL, 2, 2]
    for line in outcome.lines:
        assert line.endswith(" does not answer: rank 0, which keeps it, is gone or stopped")
    assert outcome.lines


def test_an_attempt_knows_nothing_of_the_one_before(play):
    outcome = play(restarted)
    assert outcome.codes == [0, 0]
    assert not outcome.lines


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """The store of a torchrun, for a rank in this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def test_ranks_that_do_not_join_are_named(torchrun):
    with pytest.raises(TimeoutError, match=r"^ranks \[1, 2\] of 3 did not join within 0\.2 s$"):
        open_store(0, 3, 0.2)
    with pytest.raises(TimeoutError, match=r"^rank 0 did not join within 0\.2 s$"):
        open_store(2, 3, 0.2)


def test_a_rank_that_comes_late_gets_the_store_of_this_attempt(torchrun):
    with pytest.raises(TimeoutError):  # leaves its name behind
        open_store(1, 2, 0.2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_store, 0, 2, 10.0)
        time.sleep(0.2)
        second = pool.submit(open_store, 1, 2, 10.0).result()
    second.set("key", "value")
    assert first.result().get("key") == b"value"


def test_no_patience_watches_over_nothing(tmp_path):
    before = threading.active_count()
    with Watchdog(dist.HashStore(), 0, 2, timeout=0, report=tmp_path) as watchdog:
        watchdog.mark(1, COMPUTING)
        assert threading.active_count() == before
        assert watchdog.blame(0.0) == [
            "another rank is gone; --hang-timeout 0 watches over none, so which one is not known"
        ]
        assert watchdog.blame(0.0) == []


def test_leaving_ends_the_threads(tmp_path):
    before = threading.active_count()
    with Watchdog(dist.HashStore(), 0, 1, timeout=60.0, report=tmp_path):
        assert threading.active_count() == before + 2
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


def test_more_ranks_beat_more_rarely():
    patience = 600.0
    intervals = [Watchdog(dist.HashStore(), 0, ranks, timeout=patience).interval for ranks in (1, 64, 512)]
    assert intervals == [1.0, 1.0, 5.12]
    assert Watchdog(dist.HashStore(), 0, 512, timeout=patience).silence == 60.0
    assert Watchdog(dist.HashStore(), 0, 8, timeout=5.0).silence == 5.0


def test_what_is_known_of_ranks_that_all_answer(torchrun):
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(open_store, range(2), [2, 2]))
    with Watchdog(stores[0], 0, 2, timeout=8.0) as first, Watchdog(stores[1], 1, 2, timeout=8.0):
        assert first.blame(0.0) == ["a connection between ranks failed, though all of them show signs of life"]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (
            RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv"),
            True,
        ),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (RuntimeError("CUDA out of memory"), False),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), False),
        (OSError("Connection closed by peer"), False),
    ],
)
def test_errors_of_lost_ranks(error, lost):
    assert lost_rank(error) is lost
