"""The form of a call that all techniques share: signature, docstring, AIMET's arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Concatenate, Generic, Protocol, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from aimet_ext.config import TechniqueParams
from aimet_ext.data.batches import ForwardFn
from aimet_ext.files.folders import check_output
from aimet_ext.patterns import near
from aimet_ext.registry import TECHNIQUES, Technique, load
from aimet_ext.techniques.session import RunOptions

F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P", bound=TechniqueParams)
R = TypeVar("R", covariant=True)
S = TypeVar("S", bound=TechniqueParams, contravariant=True)

#: Names of this package for AIMET's arguments, over all of its techniques.
ALIASES: Mapping[str, str] = {
    "quant_sim": "sim",
    "data_loader": "dataloader",
    "inputs": "dataloader",
    "nodes_to_exclude": "modules_to_exclude",
    "excluded_nodes": "modules_to_exclude",
    "op_types": "layers",
    "nodes_to_include": "layers",
}


# AIMET's classes of parameters, whose calls took the model first: our names of their settings.
_OLDER_PARAMS: Mapping[str, Mapping[str, str]] = {
    "AdaroundParameters": {"num_iterations": "num_iterations"},
    "SeqMseParams": {"num_candidates": "num_candidates", "inp_symmetry": "inp_symmetry"},
}


@dataclass(frozen=True, kw_only=True)
class Call(Generic[P]):
    """The arguments of one call of a technique, checked as far as possible without its data."""

    row: Technique
    sim: Any
    dataloader: Any
    params: P
    modules_to_exclude: tuple[Any, ...]
    output_path: Path | None
    options: RunOptions


class TechniqueFunction(Protocol[S, R]):
    """A public function ``apply_<name>``; :func:`technique` makes it."""

    # The one place that states the arguments, defaults and descriptions that techniques share.
    def __call__(
        self,
        sim: Any,
        dataloader: Iterable[Any] | None = None,
        *positions: Any,
        forward_fn: ForwardFn | None = None,
        modules_to_exclude: Sequence[str | nn.Module] | None = None,
        output_path: str | Path | None = None,
        checkpoint_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        params: S | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> R:
        """Apply the technique.

        What it decides is frozen; ``sim.compute_encodings`` fills in the rest. If anything fails or
        is interrupted, the simulation is left as it was.

        :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx, of any model with linear
            layers or convolutions. Mutated.{last}
        :param dataloader: Batches: a tensor of ids ``[batch, seq]`` or of another model's input
            ``[batch, …]``, a tuple of positional arguments, or a mapping of keyword arguments.
            Tokens with attention mask 0 count nowhere.
        :param forward_fn: Function called as ``forward_fn(model, batch)`` in place of
            ``model(batch)``. A callable in third position is taken for it, as in AIMET's order of
            arguments.
        :param modules_to_exclude: Layers to leave alone, with all in them: names, patterns such as
            ``"*.down_proj"``, or modules of ``sim.model``. They compute in float meanwhile.
        :param output_path: Folder for the report. A folder that this package wrote is replaced,
            another one refused.
        :param checkpoint_dir: Folder for a checkpoint of each finished stage. The same call goes on
            from there after a crash.
        :param cache_dir: Folder for memory-mapped caches; None keeps them in RAM.
        :param params: Settings, see :class:`{params}`.
        :param device: Device of the block being worked on; None leaves it where it is.
        :param progress: Show a progress bar.
        :param settings: Fields of :class:`{params}`, in place of ``params``, and ``preset``, which
            sets several: ``"fast"``, ``"balanced"`` (the defaults) or ``"best"``. AIMET's names of
            arguments (``quant_sim``, ``data_loader``, …) are understood as well.
        :returns: Objective of every layer, of plain rounding too; layers left alone with the
            reason.
        :raises TypeError: A wrong type of simulation, batch or argument, or one argument twice.
        :raises ValueError: Unusable data, a layer that no data reached, weights that hold NaN or
            are rounded already, the same technique twice.
        :raises FileExistsError: ``output_path`` holds files of somebody else.
        :raises RuntimeError: ``forward_fn`` failed.

        >>> report = {name}(sim, batches)
        >>> sim.compute_encodings(run_calibration)
        """


def technique(
    name: str, *, needs_data: bool = True
) -> Callable[[Callable[Concatenate[Call[P], ...], R]], TechniqueFunction[P, R]]:
    """Make the public function of a technique from one that takes its call.

    The public function has the arguments of :class:`TechniqueFunction`, the number of the
    technique's row in third position, and the further arguments of the decorated function. Its
    docstring describes all of them; the decorated function describes its own, and what differs.

    :param name: Name of the row in the registry.
    :param needs_data: False if the technique can be called without a dataloader; one that is
        ``data_free`` in its row always can.
    """

    def decorate(function: Callable[Concatenate[Call[P], ...], R]) -> TechniqueFunction[P, R]:
        row = TECHNIQUES[name]
        kind = load(row.params)
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        number = row.number if row.number not in [p.name for p in own] else None
        optional = row.data_free or not needs_data
        signature, order = _signature(row, function, own, kind, not optional), row.order

        @functools.wraps(function)
        def apply(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _in_own_order(apply, order, args, kwargs)
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            bound.apply_defaults()
            given = bound.arguments
            if row.data_free:
                _check_unread(function.__name__, number, given["dataloader"])
            if not row.resumes and given["checkpoint_dir"] is not None:
                raise ValueError(
                    f"checkpoint_dir must be left out: {function.__name__}() searches nothing that "
                    f"a checkpoint could keep, got {str(given['checkpoint_dir'])!r}"
                )
            further = {p.name: given.pop(p.name) for p in own}
            numbers = {number: given.pop(number)} if number else {}
            who, base, settings = function.__name__, given.pop("params"), given.pop("settings")
            with _settings_of(who):
                params = merge_params(kind, who, base, settings, **numbers)
            path = given.pop("output_path")
            call = Call(
                row=row,
                params=params,
                sim=given.pop("sim"),
                dataloader=given.pop("dataloader"),
                modules_to_exclude=tuple(given.pop("modules_to_exclude", None) or ()),
                output_path=None if path is None else check_output(path),
                options=RunOptions(**given),
            )
            with _settings_of(who):
                return function(call, **further)

        apply.__signature__ = signature  # type: ignore[attr-defined]
        apply.__annotations__ = {
            **{p.name: p.annotation for p in signature.parameters.values()},
            "return": signature.return_annotation,
        }
        apply.__doc__ = _docstring(row, function, kind, signature)
        return apply

    return decorate


def _check_unread(who: str, number: str | None, dataloader: Any) -> None:
    """Refuse data that is none, where a technique reads none.

    :raises TypeError: Such as a number in second position.
    """
    if dataloader is None or isinstance(dataloader, Iterable) or callable(dataloader):
        return
    more = f", {number}={dataloader!r}" if number else ""
    raise TypeError(
        f"{who}() reads no data: dataloader must be left out, or be None or batches, which other "
        f"techniques take in second position, got {dataloader!r}; call {who}(sim{more})"
    )


def merge_params(
    kind: type[P], who: str, params: P | None, settings: Mapping[str, Any], **number: Any
) -> P:
    """Return the settings of a run, checked.

    :param who: Name of the function, for messages.
    :param params: Base; None for the defaults.
    :param settings: Fields that replace those of ``params``.
    :param number: The number in third position; counts unless it is the default and ``params``
        or a preset are given.
    :raises TypeError: A field that does not exist, or ``params`` of another class.
    :raises ValueError: A value that is not allowed.
    """
    if params is not None and type(params) is not kind:
        raise TypeError(f"params must be {kind.__name__}, got {type(params).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    chosen = params is not None or "preset" in settings
    try:
        settings = kind.renamed(settings)
    except ValueError as error:
        raise ValueError(f"{who}(): {error}") from None
    unknown = sorted(set(settings) - set(fields))
    if unknown:
        raise TypeError(
            f"{who}() has no setting {', '.join(unknown)}; it has {', '.join(fields)}"
            f"{near(unknown, fields)}"
        )
    given = {n: v for n, v in number.items() if not chosen or v != fields[n].default}
    values = {**settings, **given}
    base = {} if params is None else {name: getattr(params, name) for name in fields}
    return kind(**{**base, **values})


@contextmanager
def _settings_of(who: str) -> Iterator[None]:
    """Say in one line which setting of a function is not allowed."""
    try:
        yield
    except ValidationError as error:
        said = [
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}, got {_short(each['input'])}"
            for each in error.errors(include_url=False)
        ]
        raise ValueError(f"{who}(): {'; '.join(said)}") from None


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


# ------------------------------------------------------------------------ signature and docstring


def _signature(
    row: Technique, function: Any, own: Sequence[Parameter], kind: Any, needs_data: bool
) -> Signature:
    common = inspect.signature(TechniqueFunction.__call__, eval_str=True).parameters
    kept = {name: p for name, p in common.items() if name not in ("self", "positions")}
    kept["params"] = kept["params"].replace(annotation=kind | None)
    if needs_data:
        kept["dataloader"] = kept["dataloader"].replace(
            annotation=Iterable[Any], default=Parameter.empty
        )
    every = {**kept, **{p.name: p for p in own}}
    if row.number and row.number not in every:
        default = next(f.default for f in dataclasses.fields(kind) if f.name == row.number)
        every[row.number] = Parameter(
            row.number, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=type(default)
        )
    found = sorted(every.values(), key=lambda p: p.kind)
    returns = inspect.signature(function, eval_str=True).return_annotation
    return Signature(found, return_annotation=returns)


# Descriptions of arguments that a technique without data has for its calls to be like others.
_WITHOUT_DATA = {
    "param dataloader": "Not needed and not read: None, or batches as for other techniques.",
    "param forward_fn": "Not needed and not called.",
    "param cache_dir": "Folder for the original weights meanwhile; None keeps them in RAM.",
    "param checkpoint_dir": "Folder for a checkpoint of each finished layer. The same call goes on "
    "from there after a crash.",
    "param device": "Device of the layer being worked on; None leaves it where it is.",
    "raises TypeError": "A wrong type of simulation or argument, or one argument twice.",
    "raises ValueError": "A layer that cannot be decided, weights that hold NaN or are rounded "
    "already, the same technique twice.",
    "raises RuntimeError": "",
    "returns": "Errors of every layer's weights; layers left alone with the reason.",
}
_FIELD = re.compile(r"^:(param \w+|returns|raises \w+): ", re.MULTILINE)


def _docstring(row: Technique, function: Any, kind: type, signature: Signature) -> str:
    common = inspect.getdoc(TechniqueFunction.__call__) or ""
    last = " Run this last of all techniques: it needs float weights and leaves rounded ones."
    for word, text in {
        "{last}": last if row.rounds else "",
        "{params}": kind.__name__,
        "{name}": function.__name__,
    }.items():
        common = common.replace(word, text)
    text, fields, example = _sections(common)
    own_text, own_fields, own_example = _sections(inspect.cleandoc(function.__doc__ or ""))
    if not row.resumes:
        fields["param checkpoint_dir"] = "Must be left out: nothing is searched."
    if row.data_free:
        fields = {**fields, **_WITHOUT_DATA}
        own_text += f"\n\nNo data is needed, and none is read: ``{function.__name__}(sim)``."
    fields = {**_sections(inspect.getdoc(kind) or "")[1], **fields, **own_fields}
    wanted = [f"param {name}" for name in signature.parameters]
    wanted += [key for key in fields if not key.startswith("param")]
    described = "\n".join(f":{key}: {fields[key]}" for key in wanted if fields.get(key))
    return "\n\n".join(
        [own_text, text.partition("\n\n")[2], described, own_example or example, ""]
    ).rstrip(" ")


def _sections(doc: str) -> tuple[str, dict[str, str], str]:
    """Split a docstring into its text, its fields and its example."""
    doc, _, example = doc.partition("\n\n>>> ")
    text, *parts = _FIELD.split(doc)
    fields = dict(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))
    return text.strip(), fields, f">>> {example}" if example else ""


# --------------------------------------------------------------------------------- AIMET's calls


def accepts_aimet_arguments(order: Sequence[str]) -> Callable[[F], F]:
    """Have a function understand a call that was written for AIMET's function of that name.

    A callable in third position is AIMET's ``forward_fn``. It and more positional arguments than
    the function takes are understood in AIMET's order. Keyword arguments may have AIMET's names.

    :param order: Names of this package for AIMET's arguments, in AIMET's order.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _in_own_order(function, order, args, kwargs)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _in_own_order(
    function: Callable[..., Any], order: Sequence[str], args: tuple[Any, ...], kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call under the names and in the order of a function.

    :raises TypeError: Too many of them, or one twice.
    """
    known = inspect.signature(function).parameters
    own = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in known.values())
    who, named = function.__name__, dict(kwargs)
    _refuse_older_form(who, args, kwargs)
    third = len(args) > 2 and callable(args[2])
    if third or len(args) > own:
        names = order
        if third and "forward_fn" not in order[2:3]:
            names = (*order[:2], "forward_fn")
        if len(args) > len(names):
            raise TypeError(
                f"{who}() takes at most {len(names)} positional arguments "
                f"in AIMET's order {', '.join(names)}, got {len(args)}"
            )
        for place in range(2, len(args)):
            _put(who, named, names[place], args[place], f"position {place + 1}")
        args = args[:2]
    for alias, name in ALIASES.items():
        if alias in named and alias not in known and name in known:
            if name in list(known)[: len(args)]:
                _refuse_twice(who, name, alias)
            _put(who, named, name, named.pop(alias), alias)
    return args, named


def _refuse_older_form(who: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Translate a call in the form that AIMET had before its simulation was the first argument.

    :raises TypeError: The call has that form.
    """
    given = [*args, *kwargs.values()]
    old = next((each for each in given if type(each).__name__ in _OLDER_PARAMS), None)
    model_first = len(args) > 2 and isinstance(args[0], nn.Module)
    if old is None and not model_first and not {"model", "dummy_input"} & set(kwargs):
        return
    settings = ""
    for theirs, ours in _OLDER_PARAMS.get(type(old).__name__, {}).items():
        value = getattr(old, theirs, None)
        if isinstance(value, int | str):
            settings += f", {ours}={value!r}"
    form = "a model" if old is None else type(old).__name__
    raise TypeError(
        f"{who}() takes a simulation, which it changes in place, data and settings, got AIMET's "
        f"older form with {form}: call {who}(sim, data_loader{settings})"
    )


def _put(who: str, named: dict[str, Any], name: str, value: Any, came_as: str) -> None:
    if name in named:
        _refuse_twice(who, name, came_as)
    named[name] = value


def _refuse_twice(who: str, name: str, came_as: str) -> None:
    raise TypeError(
        f"{who}() got the argument {name!r} twice, the second time as {came_as!r}; "
        f"pass {name!r} alone"
    )
