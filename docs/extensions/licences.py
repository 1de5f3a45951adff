"""The page of licences: what the installed dependencies say of theirs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata

from docutils import nodes
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

UNSTATED = "not stated"


@dataclass
class Package:
    """An installed dependency.

    :param name: as the package writes it.
    :param version: the installed one.
    :param licence: an SPDX expression, or what the package says in place of one.
    :param direct: whether aimet_ext itself asks for it.
    :param extras: extras of aimet_ext that bring it; empty if all do.
    """

    name: str
    version: str
    licence: str
    direct: bool
    extras: set[str] = field(default_factory=set)


def licence_of(said: metadata.PackageMetadata) -> str:
    """Return what a package says of its licence, the most exact field first."""
    if expression := said.get("License-Expression"):
        return expression
    classifiers = [
        text.rpartition("::")[2].strip()
        for text in said.get_all("Classifier", [])
        if text.startswith("License :: ") and text != "License :: OSI Approved"
    ]
    lines = (said.get("License") or "").strip().splitlines()
    return ", ".join(classifiers) or (lines[0] if lines else UNSTATED)


def dependencies(name: str, extras: list[str]) -> list[Package]:
    """Return all installed dependencies of a package, those of dependencies too, by name.

    :param name: the package.
    :param extras: extras of it to look at.
    """
    found: dict[str, Package] = {}
    for extra in ["", *extras]:
        waiting = [(each, True) for each in _required(name, {extra}, only=bool(extra))]
        seen: set[str] = set()
        while waiting:
            requirement, direct = waiting.pop(0)
            key = canonicalize_name(requirement.name)
            if key in seen or key == canonicalize_name(name):
                continue
            seen.add(key)
            try:
                said = metadata.metadata(key)
            except metadata.PackageNotFoundError:
                continue
            package = found.setdefault(
                key, Package(said["Name"], said["Version"], licence_of(said), direct)
            )
            package.direct |= direct
            package.extras.add(extra)
            waiting += [(each, False) for each in _required(key, requirement.extras)]
    for package in found.values():
        if "" in package.extras:
            package.extras.clear()
    return [found[key] for key in sorted(found)]


def _required(name: str, extras: set[str], *, only: bool = False) -> Iterator[Requirement]:
    """Yield what a package requires here with some extras, or only what these add."""
    for text in metadata.requires(name) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        plain = marker is None or marker.evaluate({"extra": ""})
        added = marker is not None and any(marker.evaluate({"extra": e}) for e in extras)
        if (added and not plain) or (plain and not only):
            yield requirement


class Licences(SphinxDirective):
    """Directive ``licences``: a table of the dependencies of the extras that it names."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        self.env.note_reread()
        packages = dependencies("aimet-ext", self.arguments[0].split())
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for each in packages:
            name = f"**{each.name}**" if each.direct else each.name
            writer.writerow([name, each.version, each.licence, ", ".join(sorted(each.extras))])
        lines = [f"    {line}" for line in text.getvalue().splitlines()]
        head = [".. csv-table::", '    :header: "Package", "Version", "Licence", "Extras"', ""]
        return self.parse_text_to_nodes("\n".join([*head, *lines]))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("licences", Licences)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
