"""The one place where onnxruntime sessions are created."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from aimet_ext.errors import require

_LEVELS = {"all": "ORT_ENABLE_ALL", "basic": "ORT_ENABLE_BASIC", "none": "ORT_DISABLE_ALL"}


def open_session(
    source: Any,
    *,
    optimize: Literal["all", "basic", "none"] = "all",
    threads: int | None = None,
    folder: Path | None = None,
    given: Mapping[str, Any] | None = None,
    entries: Mapping[str, str] | None = None,
    extra: str = "onnx",
    providers: Sequence[Any] | None = None,
    device: tuple[Any, Mapping[str, str]] | None = None,
    **options: Any,
) -> Any:
    """Return an ``onnxruntime.InferenceSession``, on the CPU unless told otherwise.

    :param source: File of a model, a ``ModelProto``, or a serialized one.
    :param optimize: Level of onnxruntime's graph optimizer; ``"none"`` computes the nodes as they
        are, of a QDQ model without rounding float weights and biases.
    :param threads: Number of threads within an operator, torch's if None.
    :param folder: Folder of the external data of a model that is no file.
    :param given: Arrays of initializers that a serialized model declares as external data: a model
        of more than 2 GiB is given its weights this way, without a copy.
    :param entries: Further entries of the session's configuration.
    :param extra: Optional extra of this package that installs onnxruntime.
    :param providers: Execution providers, the CPU's if None.
    :param device: Device of a registered provider, and its settings, in place of ``providers``.
    :param options: Further attributes of ``onnxruntime.SessionOptions``.
    :raises MissingExtraError: onnxruntime is not installed.
    """
    runtime = require("onnxruntime", extra)
    settings = runtime.SessionOptions()
    if threads is None:
        import torch  # which takes seconds: QNN's processes never ask for it

        threads = torch.get_num_threads()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    settings.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, _LEVELS[optimize])
    for name, value in options.items():
        setattr(settings, name, value)
    for key, text in (entries or {}).items():
        settings.add_session_config_entry(key, text)
    from_file = isinstance(source, str | Path)
    if folder is not None and not from_file:
        place = "session.model_external_initializers_file_folder_path"
        settings.add_session_config_entry(place, str(folder))
    values = {n: runtime.OrtValue.ortvalue_from_numpy(a) for n, a in (given or {}).items()}
    if values:
        settings.add_external_initializers([*values], [*values.values()])
    if from_file:
        source = str(source)
    elif not isinstance(source, bytes):
        source = source.SerializeToString()
    if device is not None:
        settings.add_provider_for_devices([device[0]], dict(device[1]))
        return runtime.InferenceSession(source, settings)
    session = runtime.InferenceSession(
        source,
        settings,
        providers=["CPUExecutionProvider"] if providers is None else list(providers),
    )
    session.given_values = values  # which must live as long as it does
    return session
