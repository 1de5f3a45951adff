"""Docstrings: functions begin with a verb, parameters are nouns, nothing is an idiom."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

import aimet_ext

PACKAGE = pathlib.Path(aimet_ext.__file__).parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# No list of verbs: words that begin a noun phrase or a clause in place of one.
QUESTIONS = {"What", "Whatever", "Whether", "Which", "Who", "Whose", "Where", "When", "Why", "How"}
DETERMINERS = {"A", "An", "The", "This", "These", "Those", "Its", "Our", "Any", "No", "None"}
DETERMINERS |= {"All", "Both", "Each", "Every", "Everything", "Nothing", "One", "Two", "Most"}
PREPOSITIONS = {"As", "At", "By", "For", "From", "In", "Of", "On", "To", "With", "Without"}
NOUNS = {"Context", "First", "Largest", "Smallest", "Input", "Mean", "Output", "Quantizer", "True"}
NO_VERB = QUESTIONS | DETERMINERS | PREPOSITIONS | NOUNS
PARAMETER = re.compile(r":param \w+: (?:of|for|to|from|in|what|whether|which|how)\b")
IDIOM = re.compile(
    r"\b(?:lest|in a row|mak(?:es?|ing) up for|made up for|what not|of ours)\b", re.I
)


def is_verb(word: str) -> bool:
    """Return False if a word is surely not an imperative; plurals are not, nor are formulas."""
    plural = word.endswith("s") and not word.endswith(("ss", "us"))
    return word.isalpha() and word not in NO_VERB and not plural


def findings(source: str) -> Iterator[str]:
    """Yield what breaks a rule, as ``line: rule: text``."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
            continue
        text = ast.get_docstring(node) or ""
        line = getattr(node, "lineno", 1)
        first = re.split(r"[\s.,:;]", text, maxsplit=1)[0]
        named = isinstance(node, FUNCTIONS) and not any(
            "property" in ast.unparse(decorator) for decorator in node.decorator_list
        )
        if text and (not is_verb(first) if named else first in QUESTIONS | {"Of"}):
            yield f"{line}: begin with a {'verb' if named else 'noun or a verb'}: {text[:60]}"
        for found in PARAMETER.finditer(text):
            yield f"{line}: a parameter is a noun: {text[found.start() :][:60]}"
        for found in IDIOM.finditer(text):
            yield f"{line}: an idiom: {found.group()}"


def test_docstrings_follow_the_rules() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{each}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for each in findings(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """The sum."""',
        'def f():\n    """Whether it holds."""',
        'def f():\n    """Names of layers."""',
        'def f():\n    """``x + y``."""',
        'def f(x):\n    """Add.\n\n    :param x: of a layer.\n    """',
        'def f():\n    """Add two in a row."""',
        'class C:\n    """What a layer holds."""',
        "class C:\n    @property\n    def p(self):\n        '''How it is done.'''",
        '"""What a module holds."""',
    ],
)
def test_a_planted_fault_is_found(source: str) -> None:
    assert list(findings(source))


def test_what_is_right_is_not_found() -> None:
    source = '''"""Sums."""\nclass C:\n    """A sum."""\n    @property\n    def p(self):
        """Its size."""
    def f(self, x):
        """Pass a layer on.

        :param x: Weight of a layer.
        """'''
    assert list(findings(source)) == []
