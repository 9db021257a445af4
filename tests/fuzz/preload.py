"""What takes long to load, once for all workers, and before the guard watches: PyTorch makes a folder then."""

import soundfile  # noqa: F401

import audiomae.data
import audiomae.training.state  # noqa: F401
from audiomae.checkpoints.shapes import check_state

from .weights import MODEL, make_model

check_state(MODEL, make_model().state_dict())
