"""What the training commands share: flags over a recipe, ranks that agree, processors, and how a run ends."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch
import tyro
from torch.utils.data import DataLoader, Sampler

from audiomae.data import ClipBatches, ClipLoader, Replacing, collate_visits
from audiomae.data.replacing import Visits
from audiomae.training.config import AgreedError, JoinError, RunConfig, SetupError
from audiomae.training.distributed import Ranks, is_main_process, join_ranks
from audiomae.training.signals import shield_worker

C = TypeVar("C", bound=RunConfig)
T = TypeVar("T")


class FilesConfig(Protocol):
    """Settings of a command that does one file after the other."""

    @property
    def device(self) -> str:
        """Where to compute."""


F = TypeVar("F", bound=FilesConfig)


def parse_run(
    config_class: type[C],
    recipes: dict[str, Callable[[str], C]],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
) -> C:
    """Read the command line: a first pass finds the recipe, a second one the flags over it.

    Args:
        config_class: What the flags set.
        recipes: By name, each made from the name of a variant.
        arguments: None is those of this process.
        prog: How the command is called.
        description: What ``--help`` says first.

    Raises:
        SetupError: An unknown recipe, variant or size, or a file of statistics that is none.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="demo")
    first.add_argument("--variant", default="paper")
    first.add_argument("--size")
    first.add_argument("--stats", type=Path)
    chosen, _ = first.parse_known_args(arguments)
    if chosen.recipe not in recipes:
        raise SetupError(f"recipe is {chosen.recipe!r}, expected one of {', '.join(recipes)}")
    try:
        config = recipes[chosen.recipe](chosen.variant)
        if chosen.size is not None:
            config = config.resized(chosen.size)
        if chosen.stats is not None:
            config = config.with_stats(chosen.stats)
    except (ValueError, OSError) as error:
        raise SetupError(str(error)) from error
    return tyro.cli(
        config_class,
        default=config,
        args=arguments,
        prog=prog,
        description=description,
        console_outputs=is_main_process(),
    )


def agree(ranks: Ranks, build: Callable[[], T]) -> T:
    """Build something on every rank. What is wrong on one of them, which may be on another machine, stops all.

    Where ``build`` makes ranks compute together, it must call :func:`agree_so_far` before.

    Raises:
        AgreedError: What any rank found to be wrong.
    """
    built, error = [], None
    try:
        built = [build()]
    except AgreedError:
        raise
    except (ValueError, OSError) as caught:
        error = str(caught)
    errors = dict.fromkeys(text for text in ranks.gather(error) if text is not None)
    if errors:
        raise AgreedError("; ".join(errors))
    return built[0]


def agree_so_far(ranks: Ranks) -> None:
    """Wait for all ranks within :func:`agree`, and raise AgreedError where one of them has found something wrong."""
    agree(ranks, lambda: None)


def agree_on_step(ranks: Ranks, step: int) -> None:
    """Raise AgreedError where ranks go on from different steps."""
    steps = ranks.gather(step)
    if len(set(steps)) > 1:
        raise AgreedError(f"ranks go on from steps {steps}: expected one output folder that all machines share")


def share_processors(workers: int | None, ranks: Ranks) -> int:
    """Divide this rank's processors between reading and, on a CPU, computing.

    Args:
        workers: Reading workers that were asked for; None takes what fits.
        ranks: This process among the others.

    Returns:
        The number of reading workers.
    """
    # A compute thread for every processor besides a reading worker would be one too many: OpenMP's threads wait for
    # each other many times a step, and one that is not running holds up the rest. Two threads on two processors of
    # which another process takes one train the demo at 7 clips/s, a single thread at 61.
    processors = max(len(os.sched_getaffinity(0)) // ranks.local_world_size, 1)
    if ranks.device.type == "cuda":
        return min(max(processors - 1, 1), 8) if workers is None else workers
    workers = min(processors - 1, 1) if workers is None else workers
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(processors - workers, 1))
    return workers


def make_loader(clips: Visits[Any], batches: Sampler[Any], ranks: Ranks, workers: int) -> DataLoader[Any]:
    """Make the loader of a split that is evaluated, whose workers live as long as it does.

    Args:
        clips: The clips; the batches tell which of them cannot be read.
        batches: Which clips a batch holds.
        ranks: This process among the others.
        workers: Processes that read; 0 reads in this one.
    """
    return DataLoader(
        Replacing(clips),
        batch_sampler=batches,
        collate_fn=collate_visits,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=shield_worker if workers > 0 else None,
        pin_memory=ranks.device.type == "cuda",
        # Starting workers would take a number from the generator that dropout uses.
        generator=torch.Generator(),
    )


def make_training_loader(
    clips: Replacing[Any], samples: int, batches: ClipBatches, ranks: Ranks, workers: int
) -> ClipLoader:
    """Make the loader of what is trained on.

    Args:
        clips: The clips.
        samples: Length of their waveforms.
        batches: Which clips a batch holds.
        ranks: This process among the others.
        workers: Processes that read; 0 reads in this one.
    """
    return ClipLoader(
        clips,
        samples,
        batches,
        workers=workers,
        worker_init=shield_worker,
        pin_memory=ranks.device.type == "cuda",
    )


def run_command(prog: str, run: Callable[[], int | None]) -> None:
    """Run a command; what is wrong with settings, data or checkpoints ends it with one line and exit status 2.

    Args:
        prog: How the command is called.
        run: What it does; an exit status that it returns is passed on.
    """
    try:
        status = run()
    except SetupError as error:
        if _tells(error):
            where = "" if is_main_process() else f" (rank {os.environ['RANK']})"
            print(f"{prog}: error{where}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_main_process():
            print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    if status:
        sys.exit(status)


def _tells(error: SetupError) -> bool:
    """Whether it is up to this rank to tell an error."""
    if isinstance(error, AgreedError):
        return is_main_process()
    return isinstance(error, JoinError) or int(os.environ.get("LOCAL_RANK", 0)) == 0


def run_on_files(prog: str, parse: Callable[[], F], run: Callable[[F, Ranks], int]) -> NoReturn:
    """Run a command that does one file after the other, and exit.

    Wrong settings end it with one line and exit status 2; files that fail, which ``run`` names, with exit status 1.

    Args:
        prog: How the command is called.
        parse: Reads its settings, which have a ``device``.
        run: Does all files, and returns how many of them failed.
    """
    try:
        config = parse()
        with join_ranks(config.device) as ranks:
            try:
                failed = run(config, ranks)
            except (ValueError, OSError) as error:
                raise SetupError(str(error)) from error
    except SetupError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if failed else 0)
