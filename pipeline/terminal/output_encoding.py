"""Output that works in every encoding: what a stream cannot encode is written in ASCII.

One handler of encoding errors, set on stdout and stderr when a command starts, covers tables, bars, help and messages
alike. Without it, a result could not be printed in a Latin-1 or ASCII locale. Standard library only.
"""

from __future__ import annotations

import codecs
import io
import sys

FALLBACK = {
    **dict.fromkeys("▏▎▍▌▋▊▉", "-"),  # a bar's last, partly filled character
    **{"█": "#", "▶": ">", "◀": "<", "■": "*", "─": "-"},
    **{"…": "...", "·": "-", "–": "-", "—": "-", "→": "->", "×": "x", "±": "+/-", "²": "^2"},
    **{"α": "alpha", "γ": "gamma", "τ": "tau", "≥": ">=", "≤": "<="},
}
"""ASCII for the characters that commands print themselves; others, such as a token's, become escapes."""

ERRORS = "distill.ascii"
_PLAIN_ASCII = "distill-ascii"


def use_fallbacks() -> None:
    """Lets stdout and stderr write any text, whatever their encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not one that somebody captures
            ascii_only = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding=_PLAIN_ASCII if ascii_only else None, errors=ERRORS)


def can_print(text: str) -> bool:
    """Whether stdout can write `text` as it is; also if stdout is closed, and nothing is written."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    written = (FALLBACK.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return "".join(written), error.end


def _plain_ascii(name: str) -> codecs.CodecInfo | None:
    """ASCII under a name of its own: click writes UTF-8 to a stream whose encoding is called ASCII."""
    if name.replace("_", "-") != _PLAIN_ASCII:
        return None
    known = codecs.lookup("ascii")
    return codecs.CodecInfo(
        known.encode, known.decode, known.streamreader, known.streamwriter,
        known.incrementalencoder, known.incrementaldecoder, _PLAIN_ASCII,
    )  # fmt: skip


codecs.register_error(ERRORS, _in_ascii)
codecs.register(_plain_ascii)
