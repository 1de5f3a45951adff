"""Models by name: found in the local cache, or told how to get them; never downloaded."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from aimet_ext import cli, examples
from aimet_ext.models.cache import model_folder, model_name

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A cache with one model of two revisions, as huggingface_hub lays it out."""
    folder = tmp_path / "hub" / "models--made--up"
    (folder / "refs").mkdir(parents=True)
    for ref, commit in (("main", "a" * 40), ("old", "b" * 40)):
        (folder / "refs" / ref).write_text(commit)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in examples.model_dir().iterdir():
            if ref == "main" or file.suffix != ".safetensors":
                (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_a_folder_is_itself(tmp_path: pathlib.Path) -> None:
    assert model_folder(str(tmp_path)) == tmp_path


def test_a_cached_model_is_called_by_its_name(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert model_name(model_folder("made/up")) == "made/up"
    assert model_name(examples.model_dir()) == examples.model_dir().name
    (plain := tmp_path / "models--a--b").mkdir()
    assert model_name(plain) == "models--a--b"


def test_a_cached_model_is_found(cache: pathlib.Path) -> None:
    assert (model_folder("made/up") / "config.json").is_file()
    assert model_folder("made/up@main") == model_folder("made/up")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", r"it is not there.*hf download org/absent \(huggingface-cli.*\.onnx file$"),
        ("made/up@next", r"hf download made/up --revision next"),
        ("made/up@old", r"only .*config\.json.* is there.*hf download made/up --revision old"),
        ("absent.onnx", "there is no file absent.onnx"),
        ("/no/such/place", "no model of the Hugging Face hub is called so; the path exists as far"),
        ("./absent", "a folder, or a name such as org/model, is required"),
        ("a/b/c", "a folder, or a name such as org/model, is required"),
    ],
)
def test_what_is_not_there_is_told_how_to_get(cache: pathlib.Path, name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        model_folder(name)


def test_a_path_like_one_that_exists_is_asked_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama-w4").mkdir()
    (tmp_path / "vision.onnx").touch()
    monkeypatch.chdir(tmp_path)
    for name, meant in (
        ("./lama-w4", "llama-w4"),
        ("lama-w4", "llama-w4"),
        ("visoin.onnx", "vision.onnx"),
        (f"{tmp_path}/lama-w4", f"{tmp_path}/llama-w4"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            model_folder(name)
        assert str(caught.value).endswith(f"did you mean '{meant}'?"), name


def test_a_shard_that_is_not_in_the_cache_is_named(cache: pathlib.Path) -> None:
    folder = model_folder("made/up")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    whole.rename(folder / "model-00001-of-00002.safetensors")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    with pytest.raises(FileNotFoundError) as caught:
        model_folder("made/up")
    assert "not all of it is" in str(caught.value) and "hf download made/up" in str(caught.value)
    assert shards[1] in str(caught.value) and shards[0] not in str(caught.value)
    (folder / shards[1]).touch()
    assert model_folder("made/up") == folder


def test_the_command_line_takes_names(cache: pathlib.Path) -> None:
    text = cache / "text.txt"
    text.write_text(next(iter(examples.documents("evaluation"))), "utf-8")
    options = ("--text", str(text), "--seq-length", "16", "--num-windows", "1", "--json")
    done = CliRunner().invoke(cli.app, ["evaluate", "made/up", *options])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["perplexity"] > 1
    done = CliRunner().invoke(cli.app, ["evaluate", "org/absent", *options])
    assert done.exit_code == 2 and "hf download org/absent" in " ".join(done.stderr.split())


def test_hf_home_decides_where_to_look(cache: pathlib.Path) -> None:
    code = "from aimet_ext.models.cache import model_folder; print(model_folder('made/up'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HOME": str(cache), "PYTHONPATH": str(pathlib.Path(cli.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().startswith(str(cache)), done.stderr
