"""Pre-train while the loss of some visits is infinite.

    python -m bench.faults.spoil 2:17,5:3 --output-dir runs/spoilt    # clip 17 in epoch 2, clip 3 in epoch 5

Epochs and clips count from 0; the other flags are those of ``audiomae.pretrain``.
"""

import sys
from typing import Any

from torch import Tensor

from audiomae import pretrain
from audiomae.training.pretrainer import Pretrainer


def spoil(visits: set[tuple[int, ...]]) -> None:
    """Make the loss of a micro-batch with one of these visits infinite."""
    compute_loss = Pretrainer.compute_loss

    def spoilt(trainer: Pretrainer, data: Any, *, logged: bool) -> tuple[Tensor, dict[str, Tensor]]:
        loss, others = compute_loss(trainer, data, logged=logged)
        met = visits & {tuple(pair) for pair in trainer.visits(data).tolist()}
        return (loss * float("inf") if met else loss), others

    Pretrainer.compute_loss = spoilt  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    spoil({tuple(map(int, visit.split(":"))) for visit in sys.argv.pop(1).split(",")})
    pretrain.main()
