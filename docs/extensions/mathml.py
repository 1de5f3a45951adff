"""Formulas as MathML, which browsers draw by themselves: pages need no script and no network."""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math import MathError, unichar2tex
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator


def mathml(tex: str, *, block: bool = False) -> str:
    """Translate a formula.

    :param tex: what stands in a role or directive ``math``.
    :param block: on a line of its own.
    :raises ExtensionError: it holds a command that docutils cannot translate.
    """
    try:
        return tex2mathml(tex.strip().translate(unichar2tex.uni2tex_table), as_block=block)
    except MathError as error:
        raise ExtensionError(
            f"math: a formula in LaTeX is required, got {tex!r}: {error}"
        ) from error


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{mathml(node.astext(), block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer ``mathml`` with Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
