"""The pages of runs: one file, escaped, small; and in a browser, on a telephone and a screen."""

from __future__ import annotations

import dataclasses
import html.parser
import math
import pathlib
import random
import re

import pytest
from browser import Browser, browser  # noqa: F401

from aimet_ext import RunReport
from aimet_ext.reporting.parts import (
    Budget,
    Mark,
    Phase,
    Quality,
    StateQuality,
    TechniqueResult,
    UnitResult,
    WeightUse,
)

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

EVIL = "<script>document.title='x'</script><img src=http://192.0.2.1/a onerror=alert(1)>\"'&$x^2$"


def run_of(layers: int, name: str = "model.layers.{}.mlp.down_proj", seed: int = 0) -> RunReport:
    """Return the report of a run on so many layers, of made-up numbers."""
    draw = random.Random(seed)
    names = [name.format(i) for i in range(layers)]

    def units() -> tuple[UnitResult, ...]:
        return tuple(
            UnitResult(
                name=each,
                rounding=(loss := draw.uniform(0.01, 0.1)),
                result=loss * draw.uniform(0.2, 1.0),
                sqnr_db=draw.uniform(10, 30),
                grid="int4, per_channel",
                seconds=draw.uniform(0.1, 20),
            )
            for each in names
        )

    weights = tuple(
        WeightUse(
            name=each,
            grid="int4",
            bitwidth=4,
            weights=4096,
            bits=4 * 4096 + 1024,
            counted=4096,
            qmin=-8,
            qmax=7,
            codes=tuple(draw.randrange(0, 1000) for _ in range(16)),
            low_edge=draw.uniform(0, 0.01),
            high_edge=draw.uniform(0, 0.05),
            codes_used=16,
            entropy=3.2,
            cells=64,
            scales=tuple(draw.randrange(0, 9) for _ in range(24)),
            scale_low=0.01,
            scale_median=0.02,
            scale_high=0.04,
        )
        for each in names
    )
    states = {
        "float": StateQuality(perplexity=8.0),
        "rounding": StateQuality(perplexity=10.0, kl=0.2, kl_high=2.5, flips=0.2, rows=512),
        "quantized": StateQuality(perplexity=8.5, kl=0.05, kl_high=0.7, flips=0.08, rows=512),
    }
    return RunReport(
        model=name.format("x"),
        created="2026-01-02T03:04:05+00:00",
        versions={"aimet-ext": "0", "torch": "9"},
        settings={"create_sim": {"weights": name}},
        recipe={"name": name, "techniques": ["awq", "gptq"]},
        techniques=tuple(
            TechniqueResult(
                name=each,
                measure=f"loss of {name}",
                units=units(),
                settings={"beams": 2},
                seconds=3.0,
            )
            for each in ("awq", "gptq")
        ),
        weights=weights,
        quality=Quality(text=name, windows=16, states=states),  # type: ignore[arg-type]
        phases=tuple(
            Phase(name=each, seconds=draw.uniform(1, 9), memory_bytes=10**9)
            for each in ("reading the model", name, "export")
        ),
        warnings=tuple(f"left alone: {each}" for each in names[:200]),
        widths=Budget(
            curve=((3.0, 0.5), (4.0, 0.1), (5.0, 0.02)),
            marks=(Mark(name=name, bits=4.1, kl=0.2), Mark(name="assigned", bits=4.0, kl=0.1)),
            choices={"int4": layers},
            rows=512,
            grids="",
        ),
    )


def changed(run: RunReport) -> RunReport:
    """Return a run with another setting, and other losses."""
    techniques = tuple(
        dataclasses.replace(
            result,
            units=tuple(
                dataclasses.replace(unit, result=2 * (unit.result or 0)) for unit in result.units
            ),
            settings={"beams": 8},
        )
        for result in run.techniques
    )
    return dataclasses.replace(run, techniques=techniques)


class _Parts(html.parser.HTMLParser):
    """The elements of a page and their addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for key, value in attrs:
            assert not key.startswith("on"), key
            if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value or "")
            if key == "id":
                self.ids.append(value or "")


def pages_of(run: RunReport, folder: pathlib.Path) -> dict[str, str]:
    """Write the pages of a run, and of it beside another, and return their texts."""
    run.save_html(folder / "report.html")
    run.compare(changed(run)).save_html(folder / "both.html")
    return {name: (folder / name).read_text("utf-8") for name in ("report.html", "both.html")}


@pytest.mark.parametrize("name", ["model.layers.{}.mlp.down_proj", EVIL + "{}", "名前 𝛼 é {}"])
def test_pages_stand_alone_and_are_escaped(tmp_path: pathlib.Path, name: str) -> None:
    for text in pages_of(run_of(7, name), tmp_path).values():
        parts = _Parts(text)
        assert parts.tags.isdisjoint({"script", "img", "link", "iframe", "object", "embed"})
        assert all(each.startswith(("#", "data:image/png;base64,")) for each in parts.addresses)
        assert len(parts.ids) == len(set(parts.ids))
        assert "default-src 'none'" in text


def test_a_page_of_many_layers_is_small(tmp_path: pathlib.Path) -> None:
    """Of 500 layers all are listed; of more, the worst ones, so that it grows no further."""
    sizes = {}
    for layers in (500, 1500, 3000):
        sizes[layers] = [len(text.encode()) for text in pages_of(run_of(layers), tmp_path).values()]
    assert sizes[500][0] < 1_000_000 and sizes[500][1] < 400_000
    for small, large in zip(sizes[1500], sizes[3000], strict=True):
        assert large < 1.5 * small < 3_000_000
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "the 600 of 3000 with the highest share" in text
    run_of(500).save_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert all(f"model.layers.{i}.mlp.down_proj" in text for i in range(500))


def test_a_long_name_and_note_are_cut(tmp_path: pathlib.Path) -> None:
    run = dataclasses.replace(run_of(3, "x" * 10**5 + "{}"), warnings=("y" * 10**6,))
    for text in pages_of(run, tmp_path).values():
        assert len(text.encode()) < 200_000


def test_a_page_of_nothing(tmp_path: pathlib.Path) -> None:
    run = RunReport(model="m", created="2026-01-02T03:04:05+00:00")
    texts = pages_of(run, tmp_path)
    assert "rounding to nearest" in texts["report.html"]
    assert "All settings are the same" in texts["both.html"]


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path: pathlib.Path) -> None:
    run = run_of(3)
    assert run.quality is not None and run.widths is not None
    odd = {"counted": 0, "scales": (), "scale_low": 0.0, "scale_high": math.inf}
    states = {**run.quality.states, "quantized": StateQuality(perplexity=math.inf, flips=math.nan)}
    run = dataclasses.replace(
        run,
        weights=tuple(
            dataclasses.replace(use, **odd, scale_median=math.nan) for use in run.weights
        ),
        quality=dataclasses.replace(run.quality, states=states),
        widths=dataclasses.replace(
            run.widths,
            curve=((3.0, math.inf), (4.0, math.nan)),
            marks=(Mark(name="measured", bits=4.0, kl=math.inf),),
        ),
    )
    run.save(tmp_path / "report.json")
    assert RunReport.read(tmp_path).to_dict() == run.to_dict()
    assert "– lie at an end of their grid" in pages_of(run, tmp_path)["report.html"]
    assert str(run) and str(run.compare(run))
    assert run.widths is not None
    empty = dataclasses.replace(run, widths=dataclasses.replace(run.widths, curve=(), marks=()))
    assert "bits a weight, with scales" in pages_of(empty, tmp_path)["report.html"]


def test_the_same_run_gives_the_same_page(tmp_path: pathlib.Path) -> None:
    assert pages_of(run_of(5), tmp_path) == pages_of(run_of(5), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("page", ["report.html", "both.html"])
def test_a_browser_shows_a_page(
    browser: Browser,  # noqa: F811
    tmp_path: pathlib.Path,
    page: str,
    width: int,
) -> None:
    """Nothing sticks out, nothing is asked for, and no error is logged; names run no script."""
    pages_of(run_of(30, EVIL + "." * 40 + "{}"), tmp_path)
    found = browser.look(page, width)
    assert found["scroll"] <= found["width"] <= width
    assert found["console"] == [] and found["resources"] == [] and found["scripts"] == 0
    assert sorted(found["asked"]) == sorted(["/look.html", f"/{page}"])
    assert "<script>document.title" in found["text"]
    assert "Time and memory" in found["text"] and "gptq" in found["text"]
    assert found["pictures"]
    assert all(100 < wide <= width and high > 60 for wide, high in found["pictures"])


@pytest.mark.slow
def test_the_look_finds_faults(browser: Browser, tmp_path: pathlib.Path) -> None:  # noqa: F811
    """A page too wide, a request and an error are seen."""
    (tmp_path / "bad.html").write_text(
        '<!DOCTYPE html><body><div style="width: 700px">wide</div><img src="absent.png">'
        "<script>console.error('fault')</script>",
        "utf-8",
    )
    found = browser.look("bad.html", 360)
    assert found["scroll"] > found["width"]
    assert found["resources"] and any("fault" in line for line in found["console"])
    assert "/absent.png" in found["asked"] and found["scripts"]


def test_figures_are_text_in_the_colours_of_the_page(tmp_path: pathlib.Path) -> None:
    text = pages_of(run_of(5), tmp_path)["report.html"]
    drawings = re.findall(r"<svg[^>]*xmlns.*?</svg>", text, re.DOTALL)
    assert len(drawings) >= 5
    for each in drawings:
        assert "<text" in each and "var(--" in each and not re.search(r"#(?:1b1f25|2563ec)", each)
