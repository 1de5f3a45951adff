"""The packaged model, its text and the script that trains it."""

import ast
import importlib
import inspect
import json
import pathlib
import subprocess
import sys

import pytest
import torch
import transformers

from aimet_ext import examples
from aimet_ext.examples import corpus

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))
train = importlib.import_module("train_example")
sys.path.pop(0)

WINDOW = 256
WINDOWS = 12


@pytest.fixture(scope="module")
def model() -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(
        examples.model_dir(), local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(examples.model_dir(), local_files_only=True)


@pytest.fixture(scope="module")
def windows(tokenizer: transformers.PreTrainedTokenizerBase) -> torch.Tensor:
    return train.pack(train.encode(tokenizer, examples.documents("evaluation")), WINDOW)[:WINDOWS]


@pytest.fixture(scope="module")
def perplexities(
    model: transformers.LlamaForCausalLM, windows: torch.Tensor
) -> dict[str | int, float]:
    with train.repeatable(train.Settings()):
        untrained = train.new_model(train.Settings())
    found: dict[str | int, float] = {
        "untrained": train.perplexity(untrained, windows),
        "float": train.perplexity(model, windows),
    }
    for bits in (8, 4, 3):
        found[bits] = train.perplexity(train.rounded(model, bits), windows)
    return found


# ------------------------------------------------------------------------------------ the text


def test_importing_the_examples_loads_no_framework() -> None:
    code = (
        "import sys, aimet_ext; before = set(sys.modules); import aimet_ext.examples;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new & {'torch', 'transformers', 'tokenizers', 'numpy'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_corpus_is_the_same_every_time() -> None:
    first = corpus.all_documents()
    corpus.all_documents.cache_clear()
    assert corpus.all_documents() == first


def test_splits_are_disjoint_and_sized_as_shared_out() -> None:
    splits = {name: examples.documents(name) for name in corpus.SPLITS}
    everything = [text for texts in splits.values() for text in texts]
    assert len(everything) == len(set(everything))
    for name, share in zip(corpus.SPLITS, corpus.SPLIT_SHARES, strict=True):
        assert len(splits[name]) == pytest.approx(len(everything) * share / 100, rel=0.25)
        assert all(corpus.split_of(text) == name for text in splits[name])
        assert all(len(text) >= corpus.MIN_CHARACTERS for text in splits[name])


def test_a_text_keeps_its_split() -> None:
    # Fixed answers: another rule would move texts the packaged model was trained on.
    others = {number: corpus.split_of(f"text {number}") for number in range(40)}
    assert {number: name for number, name in others.items() if name != "train"} == {
        2: "evaluation",
        10: "evaluation",
        21: "calibration",
        23: "calibration",
        30: "evaluation",
        36: "calibration",
    }


def test_documents_is_a_fresh_list() -> None:
    examples.documents("evaluation").clear()
    assert examples.documents("evaluation")


def test_text_joins_the_documents() -> None:
    assert examples.text("evaluation").startswith(examples.documents("evaluation")[0] + "\n\n")


@pytest.mark.parametrize("split", ["test", "", None])
def test_unknown_split_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'calibration', 'eval"):
        examples.documents(split)


def test_clean_dedents_and_drops_blanks() -> None:
    assert corpus.clean("  First.  \n\n\n\n    \tthen\n    more \n") == "First.\n\n    then\nmore"


def test_pieces_keep_paragraphs_whole() -> None:
    assert list(corpus.pieces(["aaaa", "bb", "cccccccccccc", "d"], limit=9)) == [
        "aaaa\n\nbb",
        "cccccccccccc",
        "d",
    ]


def test_docstrings_and_comments_of_a_source() -> None:
    source = (
        b'"""Module."""\n# one\n#   two\n\n# alone\ndef f():\n    "Function."\n    # x\n    # y\n'
    )
    assert list(corpus.docstrings(source)) == ["Module.", "Function."]
    assert list(corpus.comments(source)) == ["one\n  two", "x\ny"]
    assert list(corpus.docstrings(b"print 'broken'")) == []


def test_docstrings_are_those_of_a_walk_over_every_node() -> None:
    """In statements of every kind: methods in loops, functions in handlers and cases."""
    nested = b"""
if 1:
    def a(): "a"
else:
    def b(): "b"
for _ in x:
    class C:
        "C"
        while y:
            async def d(self): "d"
try:
    with z:
        def e(): "e"
except ValueError:
    def f(): "f"
else:
    def g(): "g"
finally:
    def h(): "h"
match z:
    case 1:
        def i(): "i"
"""
    for source in (nested, *(pathlib.Path(m.__file__).read_bytes() for m in (ast, inspect))):
        nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, corpus._DOCUMENTED))
        expected = [found for found in map(ast.get_docstring, nodes) if found]
        assert list(corpus.docstrings(source)) == expected
        assert len(expected) >= 9


def test_source_files_leave_tests_and_installed_packages_out(tmp_path: pathlib.Path) -> None:
    for name in ("b.py", "a/c.py", "test/x.py", "a/tests/x.py", "site-packages/x.py", "a/n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in corpus.source_files(tmp_path)]
    assert found == ["a/c.py", "b.py"]


# ----------------------------------------------------------------------------------- the model


def test_shapes_suit_blockwise_and_grouped_methods(model: transformers.LlamaForCausalLM) -> None:
    config = model.config
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert config.num_hidden_layers >= 4
    assert config.head_dim >= 32
    assert config.max_position_embeddings >= WINDOW
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0
            assert module.out_features % 64 == 0


def test_weights_are_small_float32_safetensors(model: transformers.LlamaForCausalLM) -> None:
    weights = [path for path in examples.model_dir().iterdir() if path.suffix == ".safetensors"]
    assert weights
    assert sum(path.stat().st_size for path in weights) <= 8_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_figures_written_down_belong_to_the_model(model: transformers.LlamaForCausalLM) -> None:
    report = json.loads((examples.model_dir() / "training.json").read_text("utf-8"))
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["curve"][-1]["step"] == report["settings"]["steps"]
    written = report["evaluation_perplexity"]
    assert written["float"] < written["w4"] < written["w3"] < written["untrained"]
    card = (examples.model_dir() / "README.md").read_text("utf-8")
    for name, label in (("float", "float"), ("w8", "W8"), ("w4", "W4"), ("w3", "W3")):
        assert f"| {label} | {written[name]:.2f} |" in card


def test_tokenizer_puts_bos_first_and_returns_the_text(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    for text in [
        *examples.documents("evaluation")[:50],
        " a ,  don't\n\n\t\u00e4\u20ac\U0001f600 .",
    ]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_windows_start_each_document_with_bos() -> None:
    documents = [torch.tensor([0, 5, 6]), torch.tensor([0, 7]), torch.tensor([0, 8, 9])]
    assert train.pack(documents, 4).tolist() == [[0, 5, 6, 0], [7, 0, 8, 9]]


def test_model_has_learnt_its_text(perplexities: dict[str | int, float]) -> None:
    # Before training it does no better than guessing one of the tokens.
    guessing = train.Settings().vocabulary
    assert perplexities["untrained"] > 0.9 * guessing
    assert perplexities["float"] < guessing / 20


def test_coarser_weights_hurt_more(perplexities: dict[str | int, float]) -> None:
    assert perplexities[8] == pytest.approx(perplexities["float"], rel=0.005)
    assert perplexities[4] > 1.02 * perplexities["float"]
    assert perplexities[3] - perplexities["float"] > 2 * (perplexities[4] - perplexities["float"])


def test_rounding_leaves_the_model_and_its_embedding_alone(
    model: transformers.LlamaForCausalLM,
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    coarse = train.rounded(model, 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(coarse.lm_head.weight, model.lm_head.weight)
    for row in coarse.model.layers[0].mlp.down_proj.weight[:8]:
        assert len(row.unique()) <= 8


# ---------------------------------------------------------------------------------- the script


def test_training_is_seeded_and_lowers_the_loss(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: examples.documents(name)[:60] for name in corpus.SPLITS}
    monkeypatch.setattr(examples, "documents", few.__getitem__)
    generator_state = torch.get_rng_state()
    threads = torch.get_num_threads()
    arguments = ["--steps", "6", "--batch", "4", "--evaluation-windows", "1"]
    for name in ("one", "two"):
        assert train.main(["--output", str(tmp_path / name), *arguments]) == 0
    assert (
        train.main(["--output", str(tmp_path / "on"), "--start", str(tmp_path / "one"), *arguments])
        == 0
    )
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json"} <= set(names)
    for name in names:
        if name != "training.json":  # which holds seconds
            first, second = (tmp_path / run / name for run in ("one", "two"))
            assert first.read_bytes() == second.read_bytes(), name
    report = json.loads((tmp_path / "one" / "training.json").read_text("utf-8"))
    assert report["curve"][-1]["held_out_loss"] < report["curve"][0]["held_out_loss"]
    further = json.loads((tmp_path / "on" / "training.json").read_text("utf-8"))
    assert further["earlier"] == report
    assert further["curve"][-1]["held_out_loss"] < report["curve"][-1]["held_out_loss"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "on" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert torch.get_num_threads() == threads
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", local_files_only=True)


def test_another_seed_gives_another_model() -> None:
    weights = []
    for seed in (0, 0, 1):
        settings = train.Settings(seed=seed)
        with train.repeatable(settings):
            weights.append(train.new_model(settings).model.embed_tokens.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_learning_rate_rises_then_falls_to_nothing() -> None:
    settings = train.Settings(steps=100, warmup=10)
    rates = [train.rate(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0)


@pytest.mark.parametrize("option", ["--steps", "--threads", "--batch", "--evaluation-windows"])
def test_senseless_numbers_are_refused(
    option: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--output", str(tmp_path), option, "0"])
    assert "must be positive; got 0" in capsys.readouterr().err
