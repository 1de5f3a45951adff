"""Errors of the command line: one message, and an exit code that scripts can use."""

from __future__ import annotations

import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from aimet_ext.errors import CorruptFileError, MissingExtraError, TransformRefused, faults_of

EXIT_CODES: dict[type[BaseException], int] = {
    MissingExtraError: 5,
    CorruptFileError: 4,
    OSError: 4,
    TransformRefused: 3,
    ValueError: 3,
    RuntimeError: 1,
    KeyboardInterrupt: 130,
}
"""What each kind of error ends the program with; the first that fits counts.

An error of any other kind is a mistake of ours and shows its traceback (exit code 1).
"""

EXIT_CODES_HELP = """\b
Exit codes:
  0    done
  1    failed while running
  2    wrong usage: an unknown option, a missing argument
  3    bad input: a model, a text or a setting that does not fit
  4    a file or folder can't be read or written, or is damaged
  5    an optional package is missing; the message names the pip command
  130  interrupted
"""


class ErrorsAsCodes(TyperGroup):
    """The commands, with an error shown as one message and turned into an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors too, in some versions of typer
            raise
        except tuple(EXIT_CODES) as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            typer.echo(f"aimet-ext: {message_of(error)}", err=True)
            raise typer.Exit(exit_code_of(error)) from error


def exit_code_of(error: BaseException) -> int:
    """Return the exit code that stands for an error."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)


def message_of(error: BaseException) -> str:
    """Return an error's message as one sentence or two; pydantic's lists are shortened."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if callable(getattr(error, "errors", None)):  # pydantic's, which need not be imported here
        return "; ".join(faults_of(error))
    return str(error) or type(error).__name__
