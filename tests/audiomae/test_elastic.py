"""A run of several torchruns that goes on by itself when a rank dies."""

import os
import random
import signal
from pathlib import Path

from bench.faults.lab import SMALL, SMALL_STEPS, Lab, References
from bench.faults.outcome import Outcome, last_step
from bench.faults.processes import ranks_of
from bench.faults.ranks import Agents
from bench.faults.stops import resumed_step


def test_a_killed_rank_is_started_again_from_the_last_checkpoint(tmp_path: Path):
    settings = (*SMALL, "--epochs", "12")
    with Lab(tmp_path / "lab", random.Random(0), References(tmp_path / "whole")) as lab:
        whole = lab.whole(*settings)
        agents = Agents(lab, output := tmp_path / "run", (*settings, "--save-steps", "1"), nodes="2")
        for _ in range(2):
            agents.start()
        agents.wait_for_ranks(2, since=0)
        reached = last_step(output)
        (process,) = ranks_of(agents.commands[1].process.pid).values()
        os.kill(process, signal.SIGKILL)
        for agent in agents.commands:
            lab.finish(agent)
    assert agents.launches() == [2, 2]
    assert f"process {process}): no sign of life" in agents.text
    resumed = [step for agent in agents.commands if (step := resumed_step(agent, SMALL_STEPS)) is not None]
    assert len(resumed) == 1
    assert resumed[0] >= reached - 1  # it may be killed between a step and its save
    outcome = Outcome()
    outcome.same_curve(output, whole)
    assert outcome.lost == []
