"""Notebooks kept as scripts (py:percent), as pages and as files for Jupyter."""

from __future__ import annotations

from pathlib import Path

import jupytext
from docutils import nodes
from myst_parser.sphinx_ import Parser
from nbformat import NotebookNode
from sphinx.application import Sphinx

FOLDER = "notebooks"


def read(text: str) -> NotebookNode:
    """Read a script with cells as a notebook, without outputs.

    :param text: the script.
    """
    return jupytext.reads(text, fmt="py:percent")


def markdown(notebook: NotebookNode) -> str:
    """Return a notebook as Markdown, code in fences.

    :param notebook: cells of Markdown and of code.
    """
    return "\n\n".join(
        cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        for cell in notebook.cells
    )


class NotebookParser(Parser):  # type: ignore[misc]
    """A parser of Sphinx for such scripts."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the Markdown, with a link to the notebook below the title."""
        title, _, rest = markdown(read(inputstring)).partition("\n")
        name = f"{Path(document['source']).stem}.ipynb"
        link = f'```{{raw}} html\n<p><a href="{name}" download>{name}</a>, for Jupyter</p>\n```'
        super().parse(f"{title}\n\n{link}\n{rest}", document)


def _write(app: Sphinx, error: Exception | None) -> None:
    """Write the files for Jupyter beside the pages."""
    if error is None and app.builder.format == "html":
        for path in (Path(app.srcdir) / FOLDER).glob("*.py"):
            target = Path(app.outdir) / FOLDER / path.with_suffix(".ipynb").name
            jupytext.write(read(path.read_text("utf-8")), target)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register scripts with cells as sources."""
    app.setup_extension("myst_parser")
    app.add_source_suffix(".py", "notebook")
    app.add_source_parser(NotebookParser)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
