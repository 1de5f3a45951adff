"""English text that every Python installation carries, cut into documents and splits.

Two sources: the topics of ``pydoc`` (the reference texts behind ``help("with")``), and the
docstrings and longer comments of the standard library, read from its source files; no module of it
is imported for that. Only the standard library is needed here.

Which split a document belongs to is decided by a hash of its text alone, so a text that two
versions of Python share falls into the same split under both.
"""

import ast
import collections
import functools
import hashlib
import importlib
import inspect
import itertools
import os
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator

SPLITS = ("train", "calibration", "evaluation")
"""Names of the splits, in the order of :data:`SPLIT_SHARES`."""

SPLIT_SHARES = (90, 5, 5)
"""Percentage of the documents which each split receives."""

MIN_CHARACTERS = 40
"""Shorter texts ("Return self.") say nothing about the language and are left out."""

MAX_CHARACTERS = 4000
"""Longer texts are cut at a blank line: one topic of 80,000 characters would fill a split."""

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Fields of statements that hold statements, in the order of their definitions.
_BODIES = ("body", "handlers", "orelse", "finalbody", "cases")


def clean(text: str) -> str:
    """Return ``text`` dedented, without tabs, trailing blanks and runs of blank lines.

    :param text: a docstring or topic as it stands in its source
    """
    lines = [line.rstrip() for line in inspect.cleandoc(text).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def pieces(paragraphs: Iterable[str], limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Join paragraphs into texts of at most ``limit`` characters.

    :param paragraphs: paragraphs without surrounding blank lines; one that alone is longer than
        ``limit`` is kept whole
    :param limit: largest number of characters of a text
    """
    held: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if held and size + len(paragraph) > limit:
            yield "\n\n".join(held)
            held, size = [], 0
        held.append(paragraph)
        size += len(paragraph) + 2
    if held:
        yield "\n\n".join(held)


def topic_texts() -> Iterator[str]:
    """Yield the ``pydoc`` topics, every paragraph once.

    Some topics repeat others in full (``specialnames`` holds ``attribute-access``). Without
    dropping the repetitions the evaluation split would hold paragraphs of the training split.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    # The longest first: what remains of a topic then reads on without gaps.
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        fresh = []
        for paragraph in clean(topics[name]).split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        yield from pieces(fresh)


def source_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Return the source files of the standard library, sorted by their relative path.

    :param root: folder of the standard library
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _SKIPPED_FOLDERS  # in place: they are not entered
        found += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def docstrings(source: bytes) -> Iterator[str]:
    """Yield the docstrings of one source file; none when it does not parse.

    :param source: content of the file; :mod:`ast` heeds its coding cookie
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # templates and samples of broken code are part of some distributions
    for node in _statements(tree):
        if isinstance(node, _DOCUMENTED):
            found = ast.get_docstring(node)
            if found:
                yield found


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield a module and all statements in it in the order of :func:`ast.walk`.

    Expressions, which are most of a tree, hold no docstrings.
    """
    waiting: collections.deque[ast.AST] = collections.deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for field in _BODIES:
            waiting.extend(getattr(node, field, ()))


def comments(source: bytes) -> Iterator[str]:
    """Yield the comments of one source file which span two or more whole lines.

    :param source: content of the file; bytes that are not UTF-8 are replaced
    """
    held: list[str] = []
    for line in [*source.decode("utf-8", "replace").splitlines(), ""]:
        line = line.strip()
        if line.startswith("#"):
            held.append(line.lstrip("#").removeprefix(" "))
            continue
        if len(held) > 1:
            yield "\n".join(held)
        held = []


def source_texts() -> Iterator[str]:
    """Yield docstrings and comments of the standard library, cleaned and cut to size."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in source_files(root):
        source = path.read_bytes()
        for found in itertools.chain(docstrings(source), comments(source)):
            yield from pieces(clean(found).split("\n\n"))


def split_of(text: str) -> str:
    """Return the name of the split which a document belongs to.

    :param text: the document
    """
    place = int(hashlib.sha256(text.encode("utf-8")).hexdigest(), 16) % 100
    bound = 0
    for name, share in zip(SPLITS, SPLIT_SHARES, strict=True):
        bound += share
        if place < bound:
            return name
    raise AssertionError("the shares of the splits do not add up to 100")


@functools.lru_cache(maxsize=1)
def all_documents() -> dict[str, tuple[str, ...]]:
    """Return every split's documents, without repetitions.

    Within a split they are ordered by their hash: the sources are mixed, so the first windows of
    a split are a fair sample of it, and the order is the same everywhere.
    """
    kept: dict[str, str] = {}
    for text in itertools.chain(topic_texts(), source_texts()):
        # "replace": a lone surrogate, which a docstring may hold, has no UTF-8 form.
        text = text.encode("utf-8", "replace").decode("utf-8")
        if len(text) >= MIN_CHARACTERS:
            kept[hashlib.sha256(text.encode("utf-8")).hexdigest()] = text
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for digest in sorted(kept):
        splits[split_of(kept[digest])].append(kept[digest])
    return {name: tuple(texts) for name, texts in splits.items()}
