"""All faults that ``bench.reliability`` makes, with what its page says of them."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.faults import clips, disks, ranks, stops
from bench.faults.lab import Lab
from bench.faults.outcome import Outcome


@dataclass(frozen=True)
class Scenario:
    """A fault that can be made.

    Attributes:
        name: On the command line.
        fault: What it is.
        how: How it is made, and what is looked at.
        times: How often, unless told otherwise; a count of kinds where each is made so often.
        few: How often, where only the scenario itself is tried.
        play: Makes it so often.
    """

    name: str
    fault: str
    how: str
    times: int
    few: int
    play: Callable[[Lab, int], Outcome]


SCENARIOS = (
    Scenario(
        "sigkill",
        "SIGKILL of a run",
        "at random moments of training, of a save and of the start; each process goes on from what the last one left",
        30,
        3,
        stops.sigkill,
    ),
    Scenario(
        "sigterm",
        "SIGTERM to a run",
        "at random moments; it ends with status 143, and the next process goes on after the very step it stopped at",
        10,
        1,
        stops.sigterm,
    ),
    Scenario(
        "sigint",
        "SIGINT to a run",
        "at random moments; it ends with status 130, and the next process goes on after the very step it stopped at",
        10,
        1,
        stops.sigint,
    ),
    Scenario(
        "signal-group",
        "SIGTERM or SIGINT to a run and its reading workers",
        "to the whole process group, as Ctrl-C and batch systems do, with 2 workers",
        6,
        1,
        stops.signal_to_group,
    ),
    Scenario(
        "signal-torchrun",
        "SIGTERM or SIGINT to a torchrun",
        "at random moments, with 2 ranks that have a worker each; all processes end, their state is saved",
        4,
        1,
        stops.signal_to_torchrun,
    ),
    Scenario(
        "worker-killed",
        "SIGKILL of a reading worker",
        "one of 2, at random moments, as the kernel does when memory is short; the run ends with a line that says so",
        3,
        1,
        stops.worker_killed,
    ),
    Scenario(
        "truncated-file",
        "a checkpoint cut off",
        "copies of one, cut at random lengths, and read",
        100,
        100,
        disks.truncated,
    ),
    Scenario(
        "flipped-file",
        "a bit of a checkpoint flipped",
        "copies of one, each with another random bit flipped, and read",
        100,
        100,
        disks.flipped,
    ),
    Scenario(
        "broken-checkpoint",
        "the last checkpoint of a killed run broken",
        "cut off, or with a bit flipped, at a random place; the run says so, and goes on from the one before it",
        4,
        1,
        disks.broken_checkpoint,
    ),
    Scenario(
        "full-disk",
        "a full disk",
        "a disk of 8 MB filled at a random moment; the run ends, names the file and says what to do, and goes on "
        "when there is room",
        6,
        2,
        disks.full_disk,
    ),
    Scenario(
        "two-runs",
        "two runs in one folder",
        "the second is refused; when the first is killed the next one gets the folder at once, though the first one's "
        "workers still live",
        3,
        1,
        disks.two_runs,
    ),
    Scenario(
        "bad-clips",
        "clips that cannot be read",
        "some of each kind among the demo clips, in runs on 1 and 2 ranks, with 0 and 2 workers each",
        3,
        1,
        clips.bad_clips,
    ),
    Scenario(
        "nonfinite-loss",
        "a loss that is not finite",
        "that of a random visit, made infinite by `bench.faults.spoil`; the run ends with step, clips and the last "
        "good checkpoint, and goes on without the fault",
        3,
        1,
        clips.nonfinite_loss,
    ),
    Scenario(
        "skip-nonfinite",
        "losses that are not finite, with `--skip-nonfinite 2`",
        "two of a run, which is left alone, or killed in between and gone on with; with `--skip-nonfinite 1` it "
        "ends at the second",
        2,
        1,
        clips.skip_nonfinite,
    ),
    Scenario(
        "divergence",
        "a learning rate that is far too high",
        "`--base-lr 1e18` and more; the run ends, and goes on from the checkpoint before at the right one",
        2,
        1,
        clips.divergence,
    ),
    Scenario(
        "rank-killed",
        "SIGKILL of a rank",
        "one of 2, at random moments; the run ends with a line that names it, and goes on",
        4,
        1,
        ranks.rank_killed,
    ),
    Scenario(
        "rank-stopped",
        "a rank that hangs",
        "SIGSTOP of one of 2, with `--hang-timeout 16`; the run ends with a line that names it, and goes on",
        2,
        1,
        ranks.rank_stopped,
    ),
    Scenario(
        "elastic",
        "ranks and machines that die and come in an elastic run",
        "three torchruns of a rank each, with `--nnodes 1:3 --max-restarts 3` and "
        "`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`: SIGKILL of a rank, then of a torchrun with its rank, then a new "
        "torchrun; the run goes on by itself, with 3, 2 and 3 ranks",
        2,
        1,
        ranks.elastic,
    ),
    Scenario(
        "other-ranks",
        "going on with another number of ranks",
        "a run stopped at random moments and gone on with on 1, 2, 4 and 1 ranks",
        3,
        1,
        ranks.other_ranks,
    ),
    Scenario(
        "combinations",
        "other numbers of ranks, workers and micro-batches",
        "whole runs with 1, 2 or 4 ranks, 0, 1 or 2 workers each, and 1, 2 or 3 micro-batches; any two values meet",
        9,
        1,
        ranks.combinations,
    ),
)
LONGEST = ("elastic", "sigkill")
"""Those that are begun first, lest they be left alone at the end."""
