"""Names of layers by pattern: one rule wherever a pattern is taken."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from fnmatch import fnmatchcase

_LEAST = 0.6  # of the letters in common


def fits(pattern: str, *names: str) -> bool:
    """Return True if one of the names is the pattern, or fits it by ``*``, ``?`` and ``[abc]``."""
    return any(name == pattern or fnmatchcase(name, pattern) for name in names)


def scopes(name: str) -> Iterator[str]:
    """Yield a name and the names of what it is in: ``/a/b/MatMul``, ``/a/b`` and ``/a``."""
    yield name
    for found in re.finditer(r"[/.]", name):
        if found.start():
            yield name[: found.start()]


def near(patterns: str | Iterable[str], names: Iterable[str], most: int = 3) -> str:
    """Return a question after names like those that fit none, the end of a message; "" for none.

    A pattern is compared with whole names and with their ends, of which each counts once.

    >>> near("*.down_prj", ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"])
    "; did you mean 'layers.0.mlp.down_proj'?"
    """
    every = list(dict.fromkeys(names))
    found: dict[str, tuple[float, str]] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        text = re.sub(r"[*?\[\]]+", "", pattern).strip("./")
        for name in every:
            likeness = max(_likeness(text, name), _likeness(_end(text), _end(name)))
            if likeness >= _LEAST and likeness > found.get(_end(name), (0.0, ""))[0]:
                found[_end(name)] = (likeness, name)
    best = sorted(found.values(), key=lambda pair: -pair[0])[:most]
    return meant(name for _, name in best)


def meant(names: Iterable[str]) -> str:
    """Return the question if one of these names was meant, the end of a message; "" for none."""
    shown = " or ".join(map(repr, names))
    return f"; did you mean {shown}?" if shown else ""


def _end(name: str) -> str:
    """Return the last part of a name, numbers left out."""
    return next((part for part in reversed(re.split(r"[/.]", name)) if not part.isdigit()), name)


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio() if one and other else 0.0
