"""The command that writes Olive's package config."""

from __future__ import annotations

import json
import pathlib

import pytest
from typer.testing import CliRunner, Result

from aimet_ext import cli

pytest.importorskip("olive")

PATH = "aimet_ext.integrations.olive.AimetQuantization"


def run(*arguments: str | pathlib.Path) -> Result:
    return CliRunner().invoke(cli.app, ["olive-config", *map(str, arguments)])


def test_it_writes_all_passes_and_says_how_to_go_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "package.json"
    done = run("--output", path)
    assert done.exit_code == 0, done.output
    assert f"olive run --config WORKFLOW --package-config {path}" in done.stdout
    passes = json.loads(path.read_text("utf-8"))["passes"]
    assert passes["AimetQuantization"]["module_path"] == PATH
    assert passes["OnnxConversion"]["module_path"].startswith("olive.")


def test_olive_can_read_it(tmp_path: pathlib.Path) -> None:
    from olive.package_config import OlivePackageConfig

    run("--output", tmp_path / "package.json")
    config = OlivePackageConfig.parse_file_or_obj(tmp_path / "package.json")
    assert config.get_pass_module_config("AimetQuantization").module_path == PATH


def test_it_replaces_its_own_file_and_no_other(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "package.json"
    assert run("--output", path).exit_code == 0
    assert run("--output", path).exit_code == 0
    path.write_text('{"notes": "mine"}', "utf-8")
    refused = run("--output", path)
    assert refused.exit_code == 4
    assert "was not written by this command" in refused.stderr
    assert path.read_text("utf-8") == '{"notes": "mine"}'


def test_it_starts_from_another_package_config(tmp_path: pathlib.Path) -> None:
    base, path = tmp_path / "base.json", tmp_path / "package.json"
    passes = {"AimetQuantization": {"module_path": "a.B"}, "Mine": {"module_path": "c.D"}}
    base.write_text(json.dumps({"passes": passes}), "utf-8")
    assert run("--base", base, "--output", path).exit_code == 0
    written = json.loads(path.read_text("utf-8"))["passes"]
    assert written["Mine"] == {"module_path": "c.D"}
    assert written["AimetQuantization"]["module_path"] == PATH


@pytest.mark.parametrize(("text", "code"), [("{", 4), ("{}", 3), ('{"passes": {}}', 3)])
def test_a_wrong_base_is_refused(tmp_path: pathlib.Path, text: str, code: int) -> None:
    base = tmp_path / "base.json"
    base.write_text(text, "utf-8")
    assert run("--base", base, "--output", tmp_path / "package.json").exit_code == code
    assert not (tmp_path / "package.json").exists()
