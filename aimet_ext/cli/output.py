"""Commands: what they give back, and the options of output that all of them have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from aimet_ext.cli.messages import messages

F = TypeVar("F", bound=Callable[..., "Result"])

FAILED = 1
"""Exit code of a check with findings."""


@dataclass(frozen=True)
class Result:
    """Findings of a command.

    :param text: For people.
    :param plain: For other programs, as JSON values.
    :param passed: False where something was checked and does not hold.
    """

    text: str
    plain: Any
    passed: bool = True


def _shared(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON for other programs.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show errors and the result alone.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show all messages, those of other libraries too."),
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            metavar="FILE",
            help="Add all messages, with times, to this file, whatever is shown.",
        ),
    ] = None,
) -> None:
    """Declare the options that every command has."""


_SHARED = inspect.signature(_shared, eval_str=True).parameters


def command(app: typer.Typer, **options: Any) -> Callable[[F], F]:
    """Make a command of a function, with the options that every command has.

    The function returns its result. That alone goes to stdout; messages, progress and what
    libraries print go to stderr.

    :param app: Program or group that gets the command.
    :param options: Further options of typer, such as ``epilog``.
    """

    def decorate(function: F) -> F:
        own = inspect.signature(function, eval_str=True).parameters

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            shared = {name: arguments.pop(name) for name in _SHARED}
            as_json = shared.pop("as_json")
            if shared["quiet"] and shared["verbose"]:
                raise typer.BadParameter("give --quiet or --verbose, not both")
            with messages(**shared):
                result = function(**arguments)
            typer.echo(_json(result.plain) if as_json else result.text)
            if not result.passed:
                raise typer.Exit(FAILED)

        later = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in _SHARED.values()]
        signature = inspect.Signature([*own.values(), *later])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
        app.command(**options)(run)
        return function

    return decorate


def _json(plain: Any) -> str:
    from aimet_ext.files.folders import json_text

    return json_text(plain)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of two columns as aligned lines."""
    longest = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{longest}}  {value}" for name, value in rows)
