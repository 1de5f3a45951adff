"""A recipe: what becomes of a model, from its grids to the last technique, as one YAML file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from aimet_ext.errors import faults_of, some
from aimet_ext.files.folders import replace_file
from aimet_ext.files.reading import naming
from aimet_ext.patterns import near
from aimet_ext.registry import TECHNIQUES, check_order, load
from aimet_ext.specs import LPBQ, STRICT, BlockSize, Blockwise, OnIndivisible, QSpec, check_widths

FLOAT = "none"
"""Width of what stays float."""

_HEAD = "# aimet-ext quantize MODEL --recipe FILE --calibration TEXT --output FOLDER\n"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Grid:
    """Grid of some weights.

    :param width: Width such as ``"int4"`` (symmetric) or ``"uint4"``, ``"none"`` for float.
    :param block_size: Input channels that share a range; None for one range a row.
    :param lpbq: The same in low-power blocks.
    :param on_indivisible: See :class:`~aimet_ext.QSpec`.
    """

    width: str = "int4"
    block_size: BlockSize | None = None
    lpbq: BlockSize | None = None
    on_indivisible: OnIndivisible = "error"

    @model_validator(mode="after")
    def _is_a_grid(self) -> Grid:
        if self.block_size is not None and self.lpbq is not None:
            raise ValueError("block_size or lpbq is required, got both; leave one out")
        check_widths("weights", {"width": self.spec()})
        return self

    @classmethod
    def of(cls, spec: QSpec | None) -> Grid:
        """Return the grid of a spec."""
        if spec is None:
            return cls(width=FLOAT)
        size, shape = spec.block_size, spec.granularity
        low_power = isinstance(shape, LPBQ)
        return cls(
            width=spec.width,
            block_size=None if low_power else size,
            lpbq=size if low_power else None,
            on_indivisible=spec.on_indivisible,
        )

    def spec(self) -> QSpec | None:
        """Return the spec that :func:`aimet_ext.create_sim` takes, None for float.

        :raises ValueError: the width is none.
        """
        if self.width == FLOAT:
            return None
        shape: Any = None
        if self.block_size is not None:
            shape = Blockwise(self.block_size)
        if self.lpbq is not None:
            shape = LPBQ(block_size=self.lpbq)
        return QSpec.parse(self.width, granularity=shape, on_indivisible=self.on_indivisible)


def _grid(value: Any) -> Any:
    """Read a grid, or a width alone."""
    return Grid(width=value) if isinstance(value, str) else _made(Grid, value)


def _activations(width: str) -> QSpec | None:
    """Return the spec of activations."""
    spec = None if width == FLOAT else QSpec.parse(width)
    check_widths("activations", {"width": spec})
    return spec


def _made(kind: Any, value: Any) -> Any:
    """Read a mapping of fields: the classes themselves convert nothing."""
    return kind(**value) if isinstance(value, Mapping) else value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CalibrationPlan:
    """Text that a recipe calibrates on.

    :param seq_length: Tokens in a window.
    :param num_batches: Batches.
    :param batch_size: Windows in a batch.
    :param files: Files of text, each of which gives the same number of windows; in a file, names
        are relative to its folder.
    :param text_field: Field or column with the text, None for the usual ones.
    """

    seq_length: Annotated[int, Field(ge=2)] = 256
    num_batches: Annotated[int, Field(ge=1)] = 16
    batch_size: Annotated[int, Field(ge=1)] = 4
    files: list[str] = field(default_factory=list)
    text_field: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Measured:
    """Result of a recipe on a model, and its cost.

    :param model: Model.
    :param text: Text of the perplexities and the calibration.
    :param float_perplexity: Perplexity of the float model.
    :param rounding: Perplexity with weights rounded to nearest.
    :param quantized: Perplexity after the recipe.
    :param seconds: Processor seconds of the techniques.
    :param machine: Processor.
    """

    model: str
    text: str
    float_perplexity: float
    rounding: float
    quantized: float
    seconds: float
    machine: str = ""

    @property
    def recovered(self) -> float:
        """Share of the loss of plain rounding that is gained back."""
        return (self.rounding - self.quantized) / (self.rounding - self.float_perplexity)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """Grids, calibration and techniques, in order; checked when it is built.

    :param name: Name.
    :param version: Version: raised whenever the recipe gives another result.
    :param description: Use of it, in a sentence.
    :param weights: Grid of the weights inside the blocks.
    :param lm_head: Grid of the output layer.
    :param activations: Width of activations, ``"none"`` for weights alone.
    :param overrides: Grids of the layers that fit a pattern such as ``"*.down_proj"``.
    :param exclude: Patterns of layers that the techniques leave to plain rounding; rotations turn
        them all the same.
    :param calibration: Text to calibrate on.
    :param techniques: Techniques with their settings, such as ``{"gptq": {"beams": 4}}``, in the
        order in which they are applied; none for plain rounding.
    :param measured: Results on models.
    :param format: Version of the form of the file.
    :raises ValueError: a field is unknown or wrong, or a technique leaves a later one nothing to
        decide.

    >>> recipe = aimet_ext.read_recipe("w4a16-fast")
    >>> sim = recipe.create_sim(model, batches[0])
    >>> reports = recipe.apply(sim, batches)
    """

    name: str = "custom"
    version: Annotated[int, Field(ge=1)] = 1
    description: str = ""
    weights: Grid = field(default_factory=Grid)
    lm_head: Grid = field(default_factory=lambda: Grid(width="int8"))
    activations: str = "uint16"
    overrides: Mapping[str, Grid] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    calibration: CalibrationPlan = field(default_factory=CalibrationPlan)
    techniques: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    format: Literal[1] = 1

    @field_validator("weights", "lm_head", mode="before")
    @classmethod
    def _reads_a_width(cls, value: Any) -> Any:
        return _grid(value)

    @field_validator("overrides", mode="before")
    @classmethod
    def _reads_widths(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        found = {}
        for name, grid in value.items():
            try:
                found[name] = _grid(grid)
            except ValidationError as error:
                raise ValueError(f"{name}: {faults_of(error)[0]}") from None
        return found

    @field_validator("activations")
    @classmethod
    def _is_a_width(cls, value: str) -> str:
        _activations(value)
        return value

    @field_validator("calibration", mode="before")
    @classmethod
    def _reads_a_plan(cls, value: Any) -> Any:
        return _made(CalibrationPlan, value)

    @field_validator("measured", mode="before")
    @classmethod
    def _reads_results(cls, value: Any) -> Any:
        return [_made(Measured, each) for each in value] if isinstance(value, list) else value

    @field_validator("techniques", mode="before")
    @classmethod
    def _reads_techniques(cls, value: Any) -> Any:
        """Read a list of names, or of names with settings, as a mapping in its order."""
        if not isinstance(value, list):
            return value
        found: dict[str, Any] = {}
        for each in value:
            one = {each: {}} if isinstance(each, str) else each
            if not isinstance(one, Mapping) or len(one) != 1:
                raise ValueError(f"a technique, or one with its settings, is required, got {each}")
            name, settings = next(iter(one.items()))
            if name in found:
                raise ValueError(f"each technique once is required, got {name} twice")
            found[name] = settings or {}
        return found

    @model_validator(mode="after")
    def _can_be_applied(self) -> Recipe:
        unknown = [name for name in self.techniques if name not in offered()]
        if unknown:
            raise ValueError(
                f"techniques: some of {', '.join(offered())} are required, got {', '.join(unknown)}"
                f"{near(unknown, offered())}"
            )
        check_turns(list(self.techniques))
        params = self.params()
        check_open(params)
        if (weights := self.weights.spec()) is not None:
            check_width(weights, params)
        return self

    def params(self) -> dict[str, Any]:
        """Return the settings of each technique, checked.

        :raises ValueError: a setting is unknown or wrong.
        """
        found = {}
        for name, settings in self.techniques.items():
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
            try:
                found[name] = load(TECHNIQUES[name].params)(**values)
            except ValidationError as error:
                raise ValueError(f"techniques: {name}: {faults_of(error)[0]}") from None
        return found

    def create_sim(self, model: Any, sample_input_ids: Any, *, in_place: bool = False) -> Any:
        """Build the simulation of a model on the grids of the recipe.

        The parameters are those of :func:`aimet_ext.create_sim`. The model may also be an
        ``onnx.ModelProto``, whose simulation is one of aimet_onnx; the table of an embedding is
        then quantized as activations are, and the sample is not needed.
        """
        grids: dict[str, Any] = {
            "weights": self.weights.spec(),
            "lm_head": self.lm_head.spec(),
            "activations": _activations(self.activations),
            "overrides": {name: grid.spec() for name, grid in self.overrides.items()},
            "in_place": in_place,
        }
        if hasattr(model, "graph"):
            from aimet_ext.grids.create_onnx import create_onnx_sim

            return create_onnx_sim(model, **grids)
        from aimet_ext.grids.create import create_sim

        return create_sim(model, sample_input_ids, **grids)

    def apply(
        self,
        sim: Any,
        dataloader: Any,
        *,
        checkpoint_dir: str | Path | None = None,
        reference: Any = None,
        watch: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ) -> dict[str, Any]:
        """Apply the techniques in order.

        :param sim: Simulation, of torch or ONNX, whatever its grids.
        :param dataloader: Calibration batches of ids ``[batch, seq]``, see :doc:`/composition`; a
            list, where there is more than one technique.
        :param checkpoint_dir: Folder in which each technique keeps finished work, to be resumed.
        :param reference: Float model, for techniques that compare with it, such as DWQ.
        :param watch: Function from the name of a technique to a context in which it is applied,
            such as :meth:`Recorder.phase <aimet_ext.Recorder.phase>`.
        :param options: Options that every technique takes, such as ``cache_dir`` or ``progress``.
        :returns: report of each technique.
        """
        place = None if checkpoint_dir is None else Path(checkpoint_dir)
        reports = {}
        excluded = {"modules_to_exclude": self.exclude} if self.exclude else {}
        for name, params in self.params().items():
            row = TECHNIQUES[name]
            own = {} if row.decides == "rotation" else excluded
            with watch(name):
                reports[name] = load(row.function)(
                    sim,
                    dataloader,
                    params=params,
                    checkpoint_dir=place / name if place is not None and row.resumes else None,
                    **({"reference": reference} if row.reference else {}),
                    **{**own, **options},
                )
        return reports

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, without what is not set."""
        plain = TypeAdapter(Recipe).dump_python(self, mode="json", exclude_none=True)
        for place in ("weights", "lm_head"):
            plain[place] = _brief(plain[place])
        plain["overrides"] = {name: _brief(grid) for name, grid in plain["overrides"].items()}
        plain["techniques"] = [
            {name: {k: v for k, v in settings.items() if v is not None}} if settings else name
            for name, settings in plain["techniques"].items()
        ]
        if not plain["calibration"]["files"]:
            del plain["calibration"]["files"]
        return {key: value for key, value in plain.items() if value not in ({}, [], "")}

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML, from which :func:`read_recipe` reads the same.

        :param path: File; ``calibration.files`` must be whole paths, or those from its folder.
        """
        replace_file(path, self.to_yaml().encode())

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        import yaml  # type: ignore[import-untyped]

        return _HEAD + yaml.safe_dump(
            self.to_dict(), sort_keys=False, allow_unicode=True, width=100
        )


def offered() -> list[str]:
    """Return the names of the techniques that a recipe may have, in the order of their turns.

    Grids are no technique here, as the recipe has them.
    """
    rows = sorted(TECHNIQUES.values(), key=lambda row: row.rank)
    return [row.name for row in rows if row.decides != "grids"]


def preset_settings(technique: str, preset: str) -> Mapping[str, Any]:
    """Return the settings that a preset of a technique stands for; empty where it has none."""
    found: Mapping[str, Any] = {}
    if technique in TECHNIQUES:
        found = load(TECHNIQUES[technique].params).presets.get(preset, {})
    return found


def check_turns(names: Sequence[str]) -> None:
    """Refuse an order of techniques that would fail in the middle of the work.

    :raises ValueError: one technique after another that leaves it nothing to decide.
    """
    check_order(names, {name: TECHNIQUES[name] for name in offered()})


def check_open(techniques: Mapping[str, Any]) -> None:
    """Refuse a technique that finds the ranges frozen which it is to choose.

    :param techniques: settings by technique, in order.
    :raises ValueError: there is one.
    """
    for earlier, later in itertools.combinations(techniques, 2):
        chooses = TECHNIQUES[later].decides in ("scales", "ranges")
        how = TECHNIQUES[earlier].freezes_if
        if chooses and how is not None and getattr(techniques[earlier], how):
            raise ValueError(
                f"{later} cannot follow {earlier}, whose {how} freezes the ranges; add --set "
                f"{earlier}.{how}=false, or {how}: false to its settings in a recipe"
            )


def check_width(weights: QSpec, techniques: Mapping[str, Any]) -> None:
    """Refuse weights that a technique would leave to plain rounding.

    :param techniques: settings by technique.
    :raises ValueError: weights of more bits than a technique decides.
    """
    for name, params in techniques.items():
        most = getattr(params, "max_bitwidth", weights.bitwidth)
        if weights.bitwidth > most:
            raise ValueError(
                f"{name} decides weights of at most {most} bits (max_bitwidth), got "
                f"{weights.bitwidth} bits; choose a smaller width, or no technique: plain rounding"
            )


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    files = resources.files(__package__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_recipe(source: str | Path) -> Recipe:
    """Read a recipe of the package, or a file.

    :param source: Name, see :func:`recipe_names`, or path of a YAML file, of which nothing is
        executed; files of text that it names are those by their way from its folder.
    :raises ValueError: there is none of that name, or the file is no recipe; the field is named.

    >>> aimet_ext.read_recipe("w4a16-fast").techniques
    {'gptq': {}}
    """
    if str(source) in recipe_names():
        text = (resources.files(__package__) / f"{source}.yaml").read_text(encoding="utf-8")
    elif not Path(source).is_file():
        raise ValueError(
            f"recipe: one of {', '.join(recipe_names())}, or a file, is required, got {source}"
            f"{near(str(source), recipe_names())}"
        )
    else:
        with naming(Path(source)):
            text = Path(source).read_text(encoding="utf-8")
    return _parsed(text, source)


def _parsed(text: str, source: str | Path) -> Recipe:
    import yaml

    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: YAML is required, got {error}") from None
    known = [each.name for each in fields(Recipe)]
    if not isinstance(values, dict):
        raise ValueError(  # noqa: TRY004 - one mistake in a file like others
            f"{source}: fields such as {', '.join(known[:4])} are required"
        )
    if strange := [str(key) for key in values if key not in known]:
        raise ValueError(
            f"{source}: the fields {', '.join(known)} are known, got {some(strange)}; a file of a "
            f"later version needs a later aimet_ext{near(strange, known)}"
        )
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        raise ValueError(f"{source}: {faults_of(error)[0]}") from None
    plan, home = recipe.calibration, Path(source).parent
    files = [os.path.normpath(home / name) for name in plan.files]
    return replace(recipe, calibration=replace(plan, files=files))


def _brief(grid: Mapping[str, Any]) -> Any:
    """Return a grid without its defaults; a width alone, if nothing else is left."""
    found = {k: v for k, v in grid.items() if (k, v) != ("on_indivisible", "error")}
    return found["width"] if len(found) == 1 else found
