"""Text files that come from elsewhere: what they say, how they are encoded, and what became of their bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from .edits import Edit, edited, edits

ENCODINGS = (*["utf-8"] * 20, *["utf-8-sig"] * 3, "utf-16", "utf-16-le", "latin-1", "utf-32")
HOSTILE = (
    *("", " ", ",", '"', "\0", "\n", "\r", "\x1f", "\x7f", "\ufeff", "\u2028", "\u202e", "é", "e\u0301", "\U0001f40d"),
    *(
        "bell",
        "horn",
        "nan",
        "1e400",
        "-1",
        "9" * 5000,
        "../..",
        "/etc/passwd",
        "~",
        "$HOME",
        "%s",
        "{}",
        "a,b",
        "a\x1fb",
        "None",
    ),
)

texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20))
# The longest are longer than a field that Python's csv reads.
long_texts = st.integers(0, 200_000).map(lambda length: "x" * length)
ends = st.sampled_from([*["\n"] * 15, *["\r\n"] * 5, "\r", "\n\n", "\x0b", "", "\0\n"])
quotes = st.sampled_from([*["always"] * 18, "never", "half"])


def csv_text(rows: Sequence[Sequence[str]], quote: str, end: str) -> str:
    """Write rows as CSV, right or wrong."""
    fields = {
        "always": lambda text: '"' + text.replace('"', '""') + '"',
        "never": str,
        "half": lambda text: f'"{text}',
    }
    return "".join(",".join(map(fields[quote], row)) + end for row in rows)


@dataclass(frozen=True)
class File:
    """A text file; a text that its encoding has not is replaced by what it has."""

    name: str
    text: str
    encoding: str = "utf-8"
    edits: tuple[Edit, ...] = ()

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        data = self.text.encode(self.encoding, "surrogatepass" if self.encoding.startswith("utf") else "replace")
        (folder / self.name).write_bytes(edited(data, self.edits))


def files(name: str, texts: st.SearchStrategy[str]) -> st.SearchStrategy[File]:
    """Make files of texts; one in four is edited."""
    return st.builds(File, st.just(name), texts, st.sampled_from(ENCODINGS), edits(once_in=4))
