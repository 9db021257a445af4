"""What the header of a sound file tells, without decoding it."""

from audiomae.data.sound_files import open_sound


def read_header(path: str) -> tuple[float, int]:
    """Read the length of a sound file, in seconds, and its sample rate, in Hz.

    Raises:
        ClipError: For a file that is missing, no audio, or empty, or whose header tells of what cannot be.
    """
    with open_sound(path) as file:
        return file.frames / file.samplerate, file.samplerate
