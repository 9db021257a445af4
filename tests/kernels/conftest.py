"""What every operator's test runs under."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` gives with NaN (ids: with the largest number), so that nothing goes unwritten unseen.

    It comes with PyTorch's deterministic mode, which on a GPU also refuses operators that are not.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
