"""How far a run is: what its state holds besides the model and the optimiser."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from audiomae.training.distributed import Ranks


@dataclass
class Progress:
    """How far a run is, in plain values and tensors.

    Attributes:
        step: Steps taken.
        best: What is known of the best epoch so far; None where nothing is.
        unread: Clips that cannot be read, by number: the step that met them first, and the reason.
        skipped_visits: Visits of such clips in the epoch.
        nonfinite: Steps that were left out because their loss or gradient was not finite, and their clips.
        meter: State of the meter of a run that was saved within an epoch; None between epochs.
    """

    step: int = 0
    best: dict[str, Any] | None = None
    unread: dict[int, tuple[int, str]] = field(default_factory=dict)
    skipped_visits: int = 0
    nonfinite: dict[int, list[int]] = field(default_factory=dict)
    meter: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise TypeError or ValueError unless the values, which a file may have had, are of these types."""
        for name, kinds in (
            ("best", (dict, type(None))),
            ("unread", dict),
            ("nonfinite", dict),
            ("meter", (dict, type(None))),
        ):
            if not isinstance(getattr(self, name), kinds):
                raise TypeError(f"its {name} is a {type(getattr(self, name)).__name__}")
        if type(self.step) is not int or self.step < 0:
            raise ValueError("its step is no number of steps")


class EpochResult(NamedTuple):
    """Averages over an epoch and all ranks.

    Attributes:
        loss: Of the model, over all steps.
        scalars: What else was logged, over the logged steps.
        stop: Number of the signal that asked the run to stop in its last steps; 0 where none did.
    """

    loss: float
    scalars: dict[str, float]
    stop: int


class Meter:
    """Averages what is logged; with its state, a run that goes on within an epoch logs what the whole one would have.

    Steps whose loss or gradient is not finite do not count.

    Args:
        recent: ``(2,)`` float32 on the device: sum of the losses since the last logged step, and how many they are.
        steps: Steps of the epoch up to the last logged one.
        loss: Sum of their losses.
        logged: Logged steps of the epoch.
        scalars: Sums of what else was logged.
    """

    def __init__(self, recent: Tensor, steps: float, loss: float, logged: int, scalars: dict[str, float]):
        self._recent, self._steps, self._loss, self._logged, self._scalars = recent, steps, loss, logged, scalars

    @classmethod
    def restore(cls, state: dict[str, Any] | None, device: torch.device) -> Self:
        """Make a meter of a state, or for the beginning of an epoch."""
        if state is None:
            return cls(torch.zeros(2, device=device), 0.0, 0.0, 0, {})
        return cls(**{**state, "recent": state["recent"].to(device)})

    def state(self, ranks: Ranks) -> dict[str, Any]:
        """What it has added up, as the mean over the ranks, which take part."""
        recent = ranks.mean(self._recent.clone()).cpu()
        return {
            "recent": recent,
            "steps": self._steps,
            "loss": self._loss,
            "logged": self._logged,
            "scalars": dict(self._scalars),
        }

    def add(self, loss: Tensor, finite: Tensor) -> None:
        """Count the loss of a step, ``()`` on the device, if it and its gradient are finite."""
        self._recent += torch.stack([loss.where(finite, 0.0), finite.float()])

    def recent(self) -> Tensor:
        """Mean loss since the last logged step, on the device; not a number where no step counts."""
        return self._recent[0] / self._recent[1]

    def log(self, loss: float, scalars: dict[str, float]) -> None:
        """Count a logged step.

        Args:
            loss: Mean of :meth:`recent` over all ranks.
            scalars: What else is logged.
        """
        steps = self._recent[1].item()
        if steps:
            self._steps += steps
            self._loss += loss * steps
        self._logged += 1
        self._scalars = {name: self._scalars.get(name, 0.0) + value for name, value in scalars.items()}
        self._recent.zero_()

    def result(self, stop: int) -> EpochResult:
        """The averages of an epoch."""
        loss = self._loss / self._steps if self._steps else float("nan")
        return EpochResult(loss, {name: total / self._logged for name, total in self._scalars.items()}, stop)
