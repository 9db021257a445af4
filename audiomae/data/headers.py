"""What the header of a sound file tells, without decoding it."""

import os

import soundfile as sf

from audiomae.data.clips import ClipError


def read_header(path: str) -> tuple[float, int]:
    """Read the length of a sound file, in seconds, and its sample rate, in Hz.

    Raises:
        ClipError: For a file that is missing, no audio, or empty.
    """
    if not os.path.isfile(path):
        raise ClipError(f"{path}: no such file")
    if path.lower().endswith(".raw"):  # by the name alone, soundfile would ask for a sample rate
        raise ClipError(f"{path}: raw audio has no header and cannot be read")
    try:
        with sf.SoundFile(os.fsencode(path)) as file:
            frames, rate = file.frames, file.samplerate
    except sf.LibsndfileError as error:
        raise ClipError(f"{path}: cannot be read as audio ({error.error_string.rstrip('.')})") from error
    if frames == 0:
        raise ClipError(f"{path}: holds no samples")
    return frames / rate, rate
