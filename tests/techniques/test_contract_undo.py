"""Nothing half-done: what fails or is interrupted leaves no trace, what is killed goes on."""

from __future__ import annotations

import pathlib
import signal
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from warm_python import WarmPython

import aimet_ext
from aimet_ext import CorruptFileError
from aimet_ext.sim.protocol import adapt

WEIGHTS_OF_A_BLOCK = 7


@pytest.fixture
def lived_in(make_sim: Any, batches: list[Tensor]) -> Any:
    """A sim with calibrated activations and every kind of state that a run could disturb."""
    sim = make_sim(activations=16)
    sim.compute_encodings(lambda model: model(batches[0]))
    adaptor = adapt(sim)
    sim.model.train()
    sim.model.get_submodule("model.model.layers.1.mlp").eval()
    for number, (name, parameter) in enumerate(sim.model.named_parameters()):
        parameter.requires_grad_(number % 3 != 0)
        if "layers.0.mlp" in name and name.endswith("proj.weight"):
            parameter.grad = torch.ones_like(parameter)
    some = next(iter(adaptor.activation_quantizers("model.model.layers.0").values()))
    some.allow_overwrite(False)
    sim.model.model.config.use_cache = True
    sim.model.register_forward_hook(lambda module, args, output: None)
    return sim


class Interruption:
    """Raises when the weight quantizers of one and a half blocks were frozen, or left open."""

    def __init__(self, technique: Any, monkeypatch: Any, error: BaseException, after: int) -> None:
        from aimet_ext.sim.torch.quantizers import TorchWeightQuantizer

        self.calls = 0
        name = "freeze" if technique.freezes else "calibrate"
        method = getattr(TorchWeightQuantizer, name)

        def raising(quantizer: Any, *args: Any) -> None:
            method(quantizer, *args)
            self.calls += 1
            if self.calls == after:
                raise error

        monkeypatch.setattr(TorchWeightQuantizer, name, raising)


@pytest.mark.parametrize("on_disk", [False, True], ids=["RAM", "cache_dir"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("none left")], ids=repr)
def test_a_failure_in_the_second_block_undoes_the_first(
    technique: Any,
    lived_in: Any,
    batches: list[Tensor],
    state_of: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    on_disk: bool,
    error: BaseException,
) -> None:
    before = state_of(lived_in)
    identity = {name: id(parameter) for name, parameter in lived_in.model.named_parameters()}
    half = WEIGHTS_OF_A_BLOCK + 3
    interruption = Interruption(technique, monkeypatch, error, half)
    cache_dir = tmp_path / "cache" if on_disk else None
    output = tmp_path / "out"
    with pytest.raises(type(error)):
        technique.apply(lived_in, batches, cache_dir=cache_dir, output_path=output)
    assert interruption.calls == half
    assert state_of(lived_in) == before
    assert identity == {name: id(p) for name, p in lived_in.model.named_parameters()}
    assert not output.exists()
    if cache_dir is not None:
        assert list(cache_dir.iterdir()) == []

    monkeypatch.undo()
    technique.apply(lived_in, batches)
    assert state_of(lived_in) != before


def test_state_after_success(
    technique: Any, lived_in: Any, batches: list[Tensor], state_of: Any
) -> None:
    """Only weights, norm gains, biases, weight quantizers and stale encodings change.

    Weights stay as they are under a technique that decides ranges alone.
    """
    before = state_of(lived_in)
    report = technique.apply(lived_in, batches)
    after = state_of(lived_in)
    reset = {
        n for entry in technique.entries(report) for n in getattr(entry, "reset_encodings", ())
    }
    for key in before:
        kind, _, name = key.partition(" ")
        if before[key] == after[key] or key == "ledger":
            continue
        assert ".layers." in name, key
        if "quantizers" in name:
            assert (
                name.endswith("param_quantizers.weight")
                or any(name.removesuffix(".min").removesuffix(".max") == stale for stale in reset)
                or ".param_quantizers.weight." in name
            ), key
        else:
            assert kind == "parameter" and (technique.by_blocks or technique.rounds), key
            assert before[key][1:] == after[key][1:], key


def test_keyboard_interrupt_while_training(
    lived_in: Any, batches: list[Tensor], state_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, steps = state_of(lived_in), []
    step = torch.optim.Adam.step

    def interrupted(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(step(optimizer, *args, **kwargs))
        if len(steps) == 6:
            raise KeyboardInterrupt
        return steps[-1]

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aimet_ext.apply_omniquant(lived_in, batches, 4, search_sweeps=0, progress=False)
    assert state_of(lived_in) == before


def test_a_failure_while_files_are_written(
    technique: Any,
    sim: Any,
    batches: list[Tensor],
    state_of: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    """The last thing that can fail: all blocks are done, the disk is full."""
    before = state_of(sim)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    from aimet_ext.files import folders

    monkeypatch.setattr(folders, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        technique.apply(sim, batches, output_path=tmp_path / "out")
    assert state_of(sim) == before
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_result_survives_a_failure(
    technique: Any,
    make_sim: Any,
    batches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    output = tmp_path / "out"
    technique.apply(make_sim(layers=1), batches, output_path=output)
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    Interruption(technique, monkeypatch, KeyboardInterrupt(), 5)
    with pytest.raises(KeyboardInterrupt):
        technique.apply(make_sim(layers=1), batches, output_path=output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == written
    monkeypatch.undo()
    technique.apply(make_sim(layers=1), batches[:2], output_path=output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} != written


def interrupt_in_second_block(technique: Any, sim: Any, batches: Any, folder: Any) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        Interruption(technique, monkeypatch, KeyboardInterrupt(), WEIGHTS_OF_A_BLOCK + 3)
        with pytest.raises(KeyboardInterrupt):
            technique.apply(sim, batches, checkpoint_dir=folder)
    done = len(list(folder.glob("block_*.safetensors")))
    assert done == technique.interrupted[0]


def test_resume_on_a_calibrated_sim(
    technique: Any,
    make_sim: Any,
    batches: list[Tensor],
    state_of: Any,
    result_of: Any,
    tmp_path: pathlib.Path,
) -> None:
    def calibrated() -> Any:
        sim = make_sim(activations=16)
        sim.compute_encodings(lambda model: model(batches[0]))
        return sim

    whole, resumed = calibrated(), calibrated()
    report = technique.apply(whole, batches)
    interrupt_in_second_block(technique, resumed, batches, tmp_path)
    again = technique.apply(resumed, batches, checkpoint_dir=tmp_path)
    every, done = len(technique.entries(report)), technique.interrupted[1]
    assert technique.resumed(again) == [True] * done + [False] * (every - done)
    assert technique.units(again) == technique.units(report)
    if technique.by_blocks:
        reset = [[block.reset_encodings for block in each.blocks] for each in (report, again)]
        assert reset[0] == reset[1]
    assert result_of(resumed) == result_of(whole)
    states = [state_of(sim) for sim in (whole, resumed)]
    for state in states:
        state["ledger"] = state["ledger"][:2]
    assert states[0] == states[1]


def test_another_run_is_not_resumed(
    technique: Any,
    make_sim: Any,
    batches: list[Tensor],
    state_of: Any,
    tmp_path: pathlib.Path,
) -> None:
    interrupt_in_second_block(technique, make_sim(), batches, tmp_path)
    name, value = technique.changed
    three_bits = {"bitwidth": 3} if technique.name == "lpbq" else {}
    other_weights = make_sim()
    with torch.no_grad():
        other_weights.model.get_submodule(
            "lm_head" if hasattr(other_weights.model, "lm_head") else "model.lm_head"
        ).weight[0, 0] += 1
    other_data = [
        (make_sim(), [batches[0], batches[1], batches[2] + 0 * 1 + 1], {}, "data was"),
        (make_sim(), batches[:2], {}, "data was"),
    ]
    cases = [
        (make_sim(), batches, {name: value}, f"settings.{name} was"),
        *(other_data if technique.from_data else ()),
        (make_sim(spec=aimet_ext.QSpec(bitwidth=3)), batches, three_bits, "layers"),
        (other_weights, batches, {}, "weights was"),
        (make_sim(embedding=aimet_ext.QSpec(bitwidth=3)), batches, {}, r"others\.\S*embed_tokens"),
    ]
    for sim, data, settings, text in cases:
        before = state_of(sim)
        with pytest.raises(ValueError, match=f"belongs to another run.*{text}"):
            technique.apply(sim, data, checkpoint_dir=tmp_path, **settings)
        assert state_of(sim) == before


class Wrapped:
    """A batch in a form that only its ``forward_fn`` knows."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


@pytest.mark.techniques(where=lambda t: t.from_data)
def test_other_data_behind_forward_fn_is_not_resumed(
    technique: Any, make_sim: Any, batches: list[Tensor], result_of: Any, tmp_path: pathlib.Path
) -> None:
    def run(data: list[Tensor], folder: pathlib.Path, factor: int = 1) -> Any:
        sim = make_sim(layers=1)
        wrapped = [Wrapped(batch) for batch in data]
        forward_fn = lambda model, batch: model(batch.tokens * factor)  # noqa: E731
        report = technique.apply(sim, wrapped, forward_fn=forward_fn, checkpoint_dir=folder)
        return result_of(sim), technique.resumed(report)

    first, _ = run(batches[:2], tmp_path)
    again, resumed = run(batches[:2], tmp_path)
    assert again == first and all(resumed)
    others = [batches[0].flip(0, 1), batches[1]]
    for data, factor in ((others, 1), (batches[1:], 1), (batches[:2], 0)):
        with pytest.raises(ValueError, match=r"belongs to another run.*data was"):
            run(data, tmp_path, factor)


def test_data_that_nothing_tells_apart_is_refused(
    make_sim: Any, batches: list[Tensor], tmp_path: pathlib.Path
) -> None:
    def forward_fn(model: Any, batch: Wrapped) -> Any:
        return model.forward(batch.tokens)  # past the hooks

    wrapped = [Wrapped(batch) for batch in batches[:2]]
    with pytest.raises(ValueError, match=r"forward_fn does not call the model with batch 0"):
        aimet_ext.apply_seq_mse(
            make_sim(layers=1), wrapped, 2, forward_fn=forward_fn, checkpoint_dir=tmp_path,
            progress=False,
        )  # fmt: skip


def test_a_damaged_checkpoint_is_named(
    technique: Any, sim: Any, batches: list[Tensor], state_of: Any, tmp_path: pathlib.Path
) -> None:
    interrupt_in_second_block(technique, sim, batches, tmp_path)
    before = state_of(sim)
    file = tmp_path / "block_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"block_00000\.safetensors"):
        technique.apply(sim, batches, checkpoint_dir=tmp_path)
    assert state_of(sim) == before


KILLED = """
    import os, signal, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(int(sys.argv[1]))
    import transformers
    import aimet_ext
    from aimet_ext.files.tensors import Checkpoints

    model_dir, checkpoint_dir, cache_dir, name = sys.argv[2:6]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    ids = [torch.arange(32).reshape(2, 16) + 3, torch.arange(24).reshape(1, 24) + 7]
    sim = aimet_ext.create_sim(
        model, ids[0], activations=None, lm_head=None, embedding=None
    )
    save = Checkpoints.save

    def save_and_die(checkpoints, index, tensors, meta):
        save(checkpoints, index, tensors, meta)
        os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = save_and_die
    settings = dict(eval(sys.argv[6]))
    getattr(aimet_ext, name)(
        sim, ids, checkpoint_dir=checkpoint_dir, cache_dir=cache_dir, progress=False, **settings
    )
"""


@pytest.mark.techniques(where=lambda t: t.name in ("omniquant", "gptq"))  # blocks, layers
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_is_resumed_to_the_bit(
    technique: Any,
    tiny_model: Any,
    result_of: Any,
    warm_python: WarmPython,
    tmp_path: pathlib.Path,
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    places = [str(tmp_path / name) for name in ("model", "checkpoints", "cache")]
    (tmp_path / "script.py").write_text(textwrap.dedent(KILLED))
    ended = warm_python.run(
        tmp_path / "script.py",
        str(torch.get_num_threads()),
        *places,
        technique.function.__name__,
        repr(sorted(technique.quick.items())),
        folder=tmp_path,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    data = [torch.arange(32).reshape(2, 16) + 3, torch.arange(24).reshape(1, 24) + 7]
    settings = {"activations": None, "lm_head": None, "embedding": None}
    whole, resumed = (aimet_ext.create_sim(model, data[0], **settings) for _ in range(2))
    technique.apply(whole, data)
    report = technique.apply(resumed, data, checkpoint_dir=tmp_path / "checkpoints")
    first, *rest = technique.checkpoints
    assert technique.resumed(report) == [True] * first + [False] * sum(rest)
    assert result_of(resumed) == result_of(whole)


def test_a_finished_run_is_read_back_whole(
    technique: Any, make_sim: Any, batches: list[Tensor], result_of: Any, tmp_path: pathlib.Path
) -> None:
    first, second = make_sim(), make_sim()
    technique.apply(first, batches, checkpoint_dir=tmp_path / "runs", cache_dir=tmp_path / "cache")
    report = technique.apply(second, batches, checkpoint_dir=tmp_path / "runs")
    assert all(technique.resumed(report))
    assert result_of(second) == result_of(first)


def test_two_runs_are_identical(
    technique: Any,
    make_sim: Any,
    batches: list[Tensor],
    outcome: Any,
    result_of: Any,
    tmp_path: pathlib.Path,
) -> None:
    """Seeded, whatever the state of the global generators, in RAM and on disk."""
    sim = make_sim(layers=1)
    torch.manual_seed(1)
    result, _ = outcome(technique, batches, 1)
    torch.manual_seed(2)
    torch.rand(5)
    state = torch.get_rng_state()
    technique.apply(sim, batches, cache_dir=tmp_path)
    assert result_of(sim) == result
    assert torch.equal(torch.get_rng_state(), state)


def test_a_block_in_training_mode_is_calibrated_without_dropout(
    technique: Any, make_sim: Any, batches: list[Tensor], outcome: Any, result_of: Any
) -> None:
    training = make_sim(layers=1)
    for module in training.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    training.model.train()
    technique.apply(training, batches)
    assert all(module.training for module in training.model.modules())
    assert result_of(training) == outcome(technique, batches, 1)[0]


def test_no_gradient_mode_of_the_caller_does_not_matter(
    technique: Any, make_sim: Any, batches: list[Tensor], outcome: Any, result_of: Any
) -> None:
    one, other = (make_sim(layers=1) for _ in range(2))
    with torch.no_grad():
        technique.apply(one, batches)
    for parameter in other.model.parameters():
        parameter.requires_grad_(False)
    technique.apply(other, batches)
    assert result_of(one) == result_of(other) == outcome(technique, batches, 1)[0]
    assert isinstance(other.model, nn.Module)
