"""Model folders: damaged, incomplete or with code of their own, they are refused by name."""

from __future__ import annotations

import builtins
import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from aimet_ext import CorruptFileError, examples

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from aimet_ext.models.folders import read_causal_lm, read_config, read_tokenizer

MARK = "RAN"
CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
class Config(LlamaConfig):
    model_type = "own_kind"
class Model(LlamaForCausalLM):
    config_class = Config
class Own(LlamaTokenizer):
    pass
"""


@pytest.fixture
def folder(tiny_llama: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "model"
    tiny_llama.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(examples.model_dir() / name, path / name)
    return path


def edit(path: pathlib.Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_sound_folder(folder: pathlib.Path) -> None:
    assert not read_causal_lm(folder, dtype="float32").training
    assert len(read_tokenizer(folder)) > 2


@pytest.mark.parametrize(
    ("drop", "named"),
    [("layers.1.mlp", "layers.1.mlp.down_proj"), ("lm_head", "lm_head"), ("embed", "embed_tokens")],
)
def test_missing_weights(folder: pathlib.Path, drop: str, named: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if drop not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"all weights.*{named}"):
        read_causal_lm(folder)


def test_a_tied_head_is_not_missing(tiny_model: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    read_causal_lm(tmp_path)


def test_weights_of_another_width(folder: pathlib.Path) -> None:
    edit(folder / "config.json", intermediate_size=96)
    with pytest.raises(ValueError, match=r"model could not be loaded"):
        read_causal_lm(folder)


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_local_experts"])
def test_more_layers_than_any_model_has(folder: pathlib.Path, field: str) -> None:
    """Refused before transformers builds them one by one."""
    edit(folder / "config.json", **{field: 10**400})
    with pytest.raises(CorruptFileError, match=rf"config\.json: {field} of at most"):
        read_causal_lm(folder)


def test_as_many_experts_as_a_config_has_by_default(folder: pathlib.Path) -> None:
    """Those of Doge, with experts or not."""
    pytest.importorskip("transformers")
    edit(folder / "config.json", num_experts=16384)
    assert read_causal_lm(folder).config.num_experts == 16384


@pytest.mark.parametrize(
    "field", ["max_position_embeddings", "hidden_size", "head_dim", "num_attention_heads"]
)
def test_sizes_below_zero(folder: pathlib.Path, field: str) -> None:
    edit(folder / "config.json", **{field: -128})
    with pytest.raises(CorruptFileError, match=rf"config\.json: {field} of at least 0"):
        read_causal_lm(folder)


def test_a_missing_shard(tiny_llama: Any, tmp_path: pathlib.Path) -> None:
    tiny_llama.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    read_causal_lm(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} .*absent"):
        read_causal_lm(tmp_path)


def test_shards_outside_of_the_folder(tiny_llama: Any, tmp_path: pathlib.Path) -> None:
    tiny_llama.save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match=r"index\.json: files of the folder.*elsewhere"):
        read_causal_lm(tmp_path)


def test_pickles_are_refused(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        read_causal_lm(folder)


@pytest.mark.parametrize("read", [read_config, read_causal_lm])
def test_code_of_a_model_is_not_run(
    folder: pathlib.Path, read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"}
    edit(folder / "config.json", model_type="own_kind", auto_map=own)
    check_unrun(folder, lambda: read(folder), monkeypatch)
    with pytest.raises(ValueError, match=r"config\.json.*auto_map names, which is not run"):
        read(folder)


def test_code_of_a_tokenizer_is_not_run(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["own_code.Own", None]},
        tokenizer_class="Own",
    )
    check_unrun(folder, lambda: read_tokenizer(folder), monkeypatch)


def check_unrun(
    folder: pathlib.Path, read: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own_code.py").write_text(CODE.format(mark=str(folder / MARK)))
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    with contextlib.suppress(ValueError):
        read()
    assert not asked and not (folder / MARK).exists()


@pytest.mark.parametrize("content", [b"{", b"[1]", b"[" * 100_000, b"\xff\xfe\x00", b""])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_damaged_files(folder: pathlib.Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=name):
        read_tokenizer(folder) if "token" in name else read_causal_lm(folder)


def test_a_device_is_no_file(folder: pathlib.Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_causal_lm(folder)
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json: a regular file"):
        read_tokenizer(folder)
