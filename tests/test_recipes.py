"""Recipes: what is read is what is written, mistakes are named, and runs can be repeated."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import aimet_ext
from aimet_ext import LPBQ, Blockwise, QSpec, Recipe, cli, examples, read_recipe

NAMES = aimet_ext.recipe_names()


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_of_the_package_is_read_and_written(name: str, tmp_path: pathlib.Path) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.description
    recipe.save(tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml") == recipe


def test_grids_become_those_of_a_simulation(tiny_model: Any) -> None:
    recipe = Recipe(
        weights={"width": "int4", "lpbq": 16},
        lm_head="int8",
        activations="none",
        overrides={"*.down_proj": {"width": "uint3", "block_size": 8}, "*.q_proj": "none"},
    )
    assert recipe.weights.spec() == QSpec(bitwidth=4, granularity=LPBQ(block_size=16))
    sim = recipe.create_sim(tiny_model("llama"), torch.arange(8)[None])
    found = {}
    for name, module in sim.model.named_modules():
        if hasattr(module, "param_quantizers"):
            found[name.rpartition(".")[2]] = dict(module.param_quantizers.items()).get("weight")
    assert found["q_proj"] is None
    assert found["down_proj"].bitwidth == 3
    assert found["down_proj"].block_size == (1, 8)
    assert found["up_proj"].bitwidth == 4
    assert found["up_proj"].decompressed_bw == 8
    assert recipe.overrides["*.down_proj"].spec() == QSpec(
        bitwidth=3, symmetric=False, granularity=Blockwise(8)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: int1", "weights.bitwidth: Input should be greater than or equal to 2, got 1"),
        ("weights: int9", "weights: width: weights of 2 to 8 bits, or of 16, are required, got 9"),
        ("lm_head: {width: int17}", "lm_head: width: weights of 2 to 8 bits, or of 16,"),
        ('overrides: {"*.q_proj": int12}', "overrides: *.q_proj: width: weights of 2 to 8 bits"),
        ("activations: int9", "activations: width: activations of 2 to 8 bits, or of 16, are"),
        ("activations: int40", "activations.bitwidth: Input should be less than or equal to 32"),
        ("weights: {width: int4, lpbq: 64, block_size: 32}", "got both"),
        ("weights: {size: 4}", "size"),
        ("activations: 16 bits", "width"),
        ("technique: [gptq]", "got technique"),
        ("techniques: [magic]", "got magic"),
        ("techniques: [gtpq]", "got gtpq; did you mean 'gptq'?"),
        (
            "tecniques: [gptq]",
            "got tecniques; a file of a later version needs a later aimet_ext; did",
        ),
        ("techniques: [{gptq: {beems: 2, dampin: 1}}]", "did you mean 'damping' or 'beams'?"),
        ("techniques: [{gptq: {preset: bst}}]", "required, got 'bst'; did you mean 'best'?"),
        ("techniques: [gptq, awq]", "'awq' cannot follow 'gptq'"),
        ("techniques: [awq, omniquant]", "freezes the ranges"),
        ("techniques: [gptq, gptq]", "gptq twice"),
        ("techniques: [{gptq: {beems: 2}}]", "gptq: beems"),
        ("techniques: [{gptq: {beams: many}}]", "gptq: beams"),
        ("{weights: int16, techniques: [gptq]}", "at most 8 bits"),
        ("calibration: {seq_length: 1}", "seq_length"),
        ("format: 2", "format"),
        ("[gptq]", "fields such as"),
        ("a: [", "YAML is required"),
        ("!!python/object/apply:os.system [ls]", "YAML is required"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        read_recipe(path)
    assert message in str(caught.value)


def test_a_recipe_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ValueError, match=rf"{NAMES[0]}.*, or a file, is required, got magic"):
        read_recipe("magic")
    with pytest.raises(ValueError, match=r"got w4a16-fats; did you mean 'w4a16-fast' or"):
        read_recipe("w4a16-fats")


def test_the_command_lists_and_prints_recipes(tmp_path: pathlib.Path) -> None:
    listed = run("recipes").stdout
    assert all(f"{name} " in listed for name in NAMES)
    path = tmp_path / "printed.yaml"
    path.write_text(run("recipes", NAMES[0]).stdout, "utf-8")
    assert read_recipe(path) == read_recipe(NAMES[0])
    assert run("recipes", "magic").exit_code == 2


def test_a_run_writes_the_recipe_that_repeats_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(examples.documents("calibration")), "utf-8")
    given = tmp_path / "given.yaml"
    given.write_text(
        "weights: {width: int4, block_size: 32}\nactivations: none\n"
        "calibration: {seq_length: 32, num_batches: 1, batch_size: 2}\n"
        "techniques: [{gptq: {scale_candidates: 2, refine_sweeps: 3}}]\n"
        'overrides: {"*.v_proj": int3, "*.k_proj": int6}\n',
        "utf-8",
    )
    model = examples.model_dir()
    common = ("quantize", model, "--calibration", text)
    done = run(*common, "--output", tmp_path / "one", "--recipe", given,
               "--set", "gptq.refine_sweeps=1", "--override", "*.v_proj=int8")  # fmt: skip
    assert done.exit_code == 0, done.output
    written = tmp_path / "one" / "recipe.yaml"
    recipe = read_recipe(written)
    assert recipe.techniques == {"gptq": {"scale_candidates": 2, "refine_sweeps": 1}}
    assert {k: grid.width for k, grid in recipe.overrides.items()} == {
        "*.v_proj": "int8",  # what was given beside the recipe counts
        "*.k_proj": "int6",
    }
    assert read_recipe(written).calibration.files == [str(text)]
    assert "- ../text.txt\n" in written.read_text("utf-8")  # whatever folder all of it is in
    measured = (  # as the package's have it
        "measured: [{model: m, text: t, float_perplexity: 1.0, rounding: 3.0, quantized: 2.0, "
        "seconds: 1.0}]\n"
    )
    written.with_name("more.yaml").write_text(written.read_text("utf-8") + measured, "utf-8")
    monkeypatch.chdir(tmp_path / "one")
    done = run("quantize", model, "--output", "../two", "--recipe", "more.yaml")
    assert done.exit_code == 0, done.output
    again = (tmp_path / "two" / "recipe.yaml").read_text("utf-8")
    assert "- ../text.txt\n" in again and "measured" not in again
    one, two = (
        dict(aimet_ext.load(tmp_path / name).model.named_parameters()) for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
