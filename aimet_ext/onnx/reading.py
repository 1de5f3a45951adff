"""ONNX files as they are read back: whole and sound, or refused by their name."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.reading import check_regular


def read_model(path: str | Path, *, external: bool = True) -> onnx.ModelProto:
    """Read an ONNX file.

    :param external: False to leave out the values that are stored in files beside it.
    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: it is damaged, or values beside it are absent, cut short, or lie in
        another folder.
    """
    path = check_regular(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is no ONNX file, or damaged: {error}") from error
    if not model.HasField("graph") or not model.opset_import:
        raise CorruptFileError(f"{path} is no ONNX file: it holds no graph")
    if external:
        read_external(model, path)
    return model


def read_external(model: onnx.ModelProto, path: Path) -> None:
    """Read the values of a model that are stored in files beside it.

    :param path: File of the model.
    :raises CorruptFileError: see :func:`read_model`.
    """
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise CorruptFileError(f"{path}: values beside it cannot be read: {error}") from error
