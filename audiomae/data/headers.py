"""What the header of a sound file tells, without decoding it."""

from audiomae.data.clips import _open


def read_header(path: str) -> tuple[float, int]:
    """Read the length of a sound file, in seconds, and its sample rate, in Hz.

    Raises:
        ClipError: For a file that is missing, no audio, or empty, or whose header tells of what cannot be.
    """
    with _open(path) as file:
        return file.frames / file.samplerate, file.samplerate
