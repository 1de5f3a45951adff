"""The texts of all errors and warnings of the package, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# They end a loop or a process and are caught where they are raised; no user sees them.
INTERNAL = {"AssertionError", "Exit", "NotImplementedError", "StopIteration"}
GAP = "…"
WARNS = {"warn", "warning"}
FEW = 12  # letters of a text that passes another one on: what fills its gaps is looked for


@dataclass(frozen=True)
class Message:
    """One text of an error.

    :param text: the constant parts, with ``…`` for what depends on the call.
    :param error: name of the exception's class.
    :param source: file, relative to the package.
    """

    text: str
    error: str
    source: str


def messages(package: Path) -> list[Message]:
    """Return the texts of a package, in the order of its files.

    Texts that only pass on another one, such as ``f"{name}: {error}"``, are left out.

    :param package: folder of the package.
    """
    trees = {
        path.relative_to(package).as_posix(): ast.parse(path.read_text("utf-8"))
        for path in sorted(package.rglob("*.py"))
    }
    everywhere: dict[str, ast.FunctionDef] = {}
    for tree in trees.values():
        everywhere |= _functions(tree)
    found = (
        Message(re.sub(r"%[-.\d]*[a-z]|…+", GAP, text).replace("%%", "%"), error, source)
        for source, tree in trees.items()
        for error, text in _File(tree, everywhere).said()
        if error not in INTERNAL and len(re.findall(r"\w{2,}", text)) > 1
    )
    return list(dict.fromkeys(found))


class _File:
    """One parsed file, and the functions of all of them, for texts that these return."""

    def __init__(self, tree: ast.Module, everywhere: dict[str, ast.FunctionDef]) -> None:
        self.tree = tree
        self.functions = everywhere | _functions(tree)

    def said(self) -> Iterator[tuple[str, str]]:
        """Yield the class and the text of each error and warning."""
        scopes = [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)]
        for scope in [self.tree, *scopes]:
            for node in _own(scope):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    yield from self.errors(node.exc, scope)
                elif isinstance(node, ast.Call) and node.args and _name(node) in WARNS:
                    yield from (("Warning", text) for text in self.texts(node.args[0], scope))

    def errors(self, call: ast.Call, scope: ast.AST) -> Iterator[tuple[str, str]]:
        """Yield what a call that makes an exception says."""
        name = _name(call)
        if name in self.functions:
            inner = self.functions[name]
            for node in _own(inner):
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
                    yield from self.errors(node.value, inner)
        elif call.args:
            for text in self.texts(call.args[0], scope):
                yield name, text

    def texts(self, node: ast.expr, scope: ast.AST, depth: int = 0) -> list[str]:
        """Return the texts that an expression may have; ``…`` where nothing is known."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else [GAP]
        if isinstance(node, ast.JoinedStr):
            return self.joined(node, scope, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = [self.texts(side, scope, depth) for side in (node.left, node.right)]
            return [left + right for left in sides[0] for right in sides[1]]
        if isinstance(node, ast.IfExp):
            return self.texts(node.body, scope, depth) + self.texts(node.orelse, scope, depth)
        if depth < 4:
            return self.followed(node, scope, depth + 1) or [GAP]
        return [GAP]

    def joined(self, node: ast.JoinedStr, scope: ast.AST, depth: int) -> list[str]:
        """Return an f-string with gaps, and where it is little more than gaps, what fills them."""
        parts = [[part.value] if isinstance(part, ast.Constant) else [GAP] for part in node.values]
        if sum(c.isalpha() for part in parts for c in part[0]) < FEW:
            parts = [
                self.texts(part.value, scope, depth)
                if isinstance(part, ast.FormattedValue)
                else known
                for part, known in zip(node.values, parts, strict=True)
            ]
        texts = [""]
        for part in parts:
            texts = [text + more for text in texts for more in part]
        return texts

    def followed(self, node: ast.expr, scope: ast.AST, depth: int) -> list[str]:
        """Return the texts of a variable or of a function of this file."""
        found: list[str] = []
        if isinstance(node, ast.Name):
            for each in _own(scope):
                named = isinstance(each, ast.Assign) and any(
                    isinstance(target, ast.Name) and target.id == node.id for target in each.targets
                )
                if named or (isinstance(each, ast.NamedExpr) and each.target.id == node.id):
                    found += self.texts(each.value, scope, depth)
            found += self.passed(node.id, scope, depth)
        if isinstance(node, ast.Call):
            inner = self.functions.get(_name(node))
            for each in _own(inner) if inner else ():
                if isinstance(each, ast.Return) and getattr(each.value, "value", each.value):
                    found += self.texts(each.value, inner, depth)
        return found

    def passed(self, name: str, scope: ast.AST, depth: int) -> Iterator[str]:
        """Yield the texts that calls of a function in this file give to one of its parameters."""
        names = [each.arg for each in scope.args.args] if isinstance(scope, ast.FunctionDef) else []
        if name not in names:
            return
        for caller in [self.tree, *_functions(self.tree).values()]:
            for call in _own(caller):
                if isinstance(call, ast.Call) and _name(call) == scope.name:
                    given = dict(zip(names, call.args, strict=False))
                    given |= {each.arg: each.value for each in call.keywords}
                    if name in given:
                        yield from self.texts(given[name], caller, depth)


def _name(call: ast.Call) -> str:
    """Return the name that is called, without what it is an attribute of."""
    return ast.unparse(call.func).rpartition(".")[2]


def _functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function or module without those of functions inside of it."""
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef):
            yield node
            waiting += ast.iter_child_nodes(node)
