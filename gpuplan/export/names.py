"""Names that every tool accepts: of a model as servers know it, of an object of Kubernetes, of a shell's variable.

A name that is fine already stays as it is. Any other is rewritten and ends in six digits of its SHA-256, so that two
names never become one. What comes from a plan goes into a comment by `shown`, and into PromQL by `promql_string`.
"""

from __future__ import annotations

import hashlib
import re

LABEL_MAX = 40
"""A DNS-1123 label has 63 characters at most. KEDA and KServe put their own words before and behind it."""
SERVED_MAX = 64
_SERVED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL = re.compile(rf"[a-z]([a-z0-9-]{{0,{LABEL_MAX - 2}}}[a-z0-9])?")


def served(model: str) -> str:
    """The model's name in requests, metrics and folders: letters, digits, `.`, `_` and `-` (Triton takes no others)."""
    if _SERVED.fullmatch(model):
        return model
    return _rewritten(model, re.sub(r"[^A-Za-z0-9._-]+", "-", model), SERVED_MAX)


def label(model: str) -> str:
    """A DNS-1123 label that begins with a letter, which Services need (RFC 1035)."""
    if _LABEL.fullmatch(model):
        return model
    return _rewritten(model, re.sub(r"[^a-z0-9]+", "-", model.lower()), LABEL_MAX)


def variable(*words: str) -> str:
    """A shell variable's name of these words: upper case, digits and `_`."""
    return re.sub(r"[^A-Z0-9]+", "_", "_".join(words).upper()).strip("_")


def shown(text: object, length_max: int = 160) -> str:
    """Plan text for a comment: one line of printable characters."""
    words = str(text) or "''"
    words = words if len(words) <= length_max else words[: length_max - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def promql_string(text: str) -> str:
    """A PromQL string in quotes. Whatever a template might read too (`{`, `$`, `<`) is escaped as Go does it."""
    return '"' + "".join(c if re.fullmatch(r"[A-Za-z0-9 ._:/-]", c) else _escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xD800 <= code <= 0xDFFF:  # half a character, which no UTF-8 label has
        code = 0xFFFD
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _rewritten(model: str, rough: str, length_max: int) -> str:
    digits = hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    word = rough.strip("-._")[: length_max - 9].strip("-._")
    if not word or not word[0].isalpha():
        word = f"m-{word}".rstrip("-")
    return f"{word}-{digits}"
