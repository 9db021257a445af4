"""What a training step turned out to be, learnt a step later, so that nothing waits for the device."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from audiomae.training.distributed import Ranks


class Verdict(NamedTuple):
    """What is known of a step, the same on all ranks but for the clips.

    Attributes:
        step: Its number.
        finite: Whether its loss and gradient were finite; if not, the optimiser left it out.
        stop: Number of the signal that asked any rank to stop; 0 where none did.
        clips: Numbers of this rank's clips in a step that was not finite.
        spoilt: Of those, the clips in micro-batches whose loss was not finite.
    """

    step: int
    finite: bool
    stop: int
    clips: list[int]
    spoilt: list[int]


class PendingVerdict:
    """A verdict on its way from the device.

    Args:
        step: Number of the step.
        finite: ``()`` bool on the device: whether the gradient, which spoilt losses spoil, was finite.
        losses: ``(micro-batches,)`` on the device: this rank's losses.
        visits: Of each micro-batch, ``(B, 2)`` int64: epochs and clips.
        stop: Number of the signal that asked this rank to stop; 0 where none did.
        ranks: This process among the others, which make theirs at the same place.
    """

    def __init__(self, step: int, finite: Tensor, losses: Tensor, visits: list[Tensor], stop: int, ranks: Ranks):
        self.step, self._visits = step, visits
        asked = ranks.send(torch.tensor([stop], dtype=torch.float32))
        if ranks.world_size > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        values = torch.cat([asked, finite.float()[None], losses.isfinite().float()])
        self._arrived: torch.cuda.Event | None = None
        if ranks.device.type == "cuda":
            self._values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values = values

    def wait(self) -> Verdict:
        """Wait for the device to be done with the step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        stop, finite, *losses = self._values.tolist()
        if finite:
            return Verdict(self.step, True, int(stop), [], [])
        clips = torch.cat(self._visits)[:, 1]
        spoilt = torch.tensor(losses).eq(0).repeat_interleave(torch.tensor([len(visits) for visits in self._visits]))
        return Verdict(self.step, False, int(stop), clips.tolist(), clips[spoilt].tolist())
