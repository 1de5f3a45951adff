"""Damage to files: what a bad disk, an interrupted copy, a wrong tool or an attacker would leave.

:func:`mutate` changes one file of a folder in a way that the seed chooses; :func:`reseal` makes the
hashes right again, so that the damage gets past them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from aimet_ext.files.manifest import hash_file
from aimet_ext.files.reading import read_safetensors
from aimet_ext.files.tensors import write_tensors

__all__ = ["mutate", "of_code", "reseal"]

MANIFEST = "manifest.json"
PICKLES = ("pytorch_model.bin", "adapter_model.bin")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X9", "", 7)
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_ZEROS = b"0" * 64


def mutate(folder: Path, draw: random.Random, names: list[str] | None = None) -> str:
    """Damage one file of a folder.

    :param names: files to choose from; None: all.
    :returns: what was done.
    """
    if names is None:
        names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    names = [name for name in names if (folder / name).is_file()]
    if not names:
        return "nothing left"
    path = folder / draw.choice(names)
    kinds: list[Callable[[Path, random.Random], str]] = [of_bytes, of_place]
    if path.suffix in (".json", ".encodings", ".jsonl"):
        kinds += [of_json] * 6
    if path.suffix.startswith(".safetensor"):
        kinds += [of_header] * 6
    if path.suffix == ".onnx":
        kinds += [of_graph] * 6
    name = path.relative_to(folder).as_posix()
    return f"{name}: {draw.choice(kinds)(path, draw)}"


def of_bytes(path: Path, draw: random.Random) -> str:
    """Bits flipped, ranges zeroed or doubled, a file cut or made longer."""
    content = bytearray(path.read_bytes())
    size = len(content)
    how = draw.choice(
        ["flip", "flips", "cut", "empty", "longer", "zero", "double", "noise", "text"]
    )
    start = draw.randrange(size) if size else 0
    if draw.random() < 0.3:
        start = min(start, draw.randrange(1, 64))  # headers are at the beginning
    stop = min(size, start + draw.choice([1, 8, 64, 4096]))
    if how in ("flip", "flips"):
        for _ in range(1 if how == "flip" else 20):
            if size:
                content[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[start:]
    elif how == "empty":
        content.clear()
    elif how == "longer":
        content += bytes(draw.randrange(256) for _ in range(draw.choice([1, 8, 1000])))
    elif how == "zero":
        content[start:stop] = bytes(stop - start)
    elif how == "double":
        content[stop:stop] = content[start:stop]
    elif how == "noise":
        content[start:stop] = draw.randbytes(stop - start)
    else:
        content = bytearray(
            '{"a": ünï 世界}'.encode(
                draw.choice(
                    ["utf-8", "utf-16", "latin-1"],
                ),
                "replace",
            )
        )
    path.write_bytes(content)
    return f"bytes {how} at {start}"


def of_place(path: Path, draw: random.Random) -> str:
    """Something else where the file was, or nothing."""
    how = draw.choice(["absent", "folder", "fifo", "device", "away", "loop", "other", "case"])
    if how == "away":  # a link to the same content: what a cache of models looks like
        target = path.parent.parent / f"{path.name}.elsewhere"
        shutil.move(path, target)
        path.symlink_to(target)
        return "a link to another place"
    others = [p for p in path.parent.iterdir() if p.is_file() and p != path]
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to(draw.choice(["/dev/zero", "/dev/stdin", "/dev/full"]))
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "other" and others:
        shutil.copy(draw.choice(sorted(others)), path)
    elif how == "case":
        path.with_name(path.name.upper()).write_bytes(b"")
    return f"place: {how}"


def of_json(path: Path, draw: random.Random) -> str:
    """A JSON document with one value or key that is not what it should be."""
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return of_bytes(path, draw)
    changed, what = of_value(document, draw)
    path.write_text(changed if isinstance(changed, _Text) else json.dumps(changed), "utf-8")
    return f"json {what}"


class _Text(str):
    """A JSON text that no value stands for: a key twice, or brackets without end."""


def odd_value(draw: random.Random) -> Any:
    """A value that hardly any field can take."""
    return draw.choice(
        [
            None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 40, 1 << 63, 1 << 64, -(1 << 63),
            10**400,
            0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"),
            "", "x", "../outside", "/etc/passwd", "/dev/zero", "a\0b", "ü世界\U0001f600",
            "x" * 10000,
            "__import__('os').system('true')", "\ud800", "(a+)+$", "[", "float8", "mean",
            [], [None], [[]], [0], [1, -1], [1 << 62, 1 << 62], ["x"], {}, {"": None}, {"x": {}},
            [[[[[[0]]]]]], [1e400],
        ]
    )  # fmt: skip


def of_value(document: Any, draw: random.Random) -> tuple[Any, str]:
    """Return a document with one place changed, and what was done there."""
    places = list(_places(document))
    if not places or draw.random() < 0.05:
        return _whole(document, draw)
    # First the level, then the place: long lists would take nearly all the places otherwise.
    depth = draw.choice(sorted({len(path) for path in places}))
    path = draw.choice([path for path in places if len(path) == depth])
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    key, where = path[-1], "/".join(map(str, path))
    old = holder[key]
    how = draw.choice(["odd", "odd", "odd", "drop", "extra", "like", "like", "swap", "deep", "key"])
    if how == "drop":
        del holder[key]
    elif how == "extra":
        if isinstance(holder, dict):
            holder[draw.choice(["", "extra", "ü", "../x", "__class__", "same_as"])] = odd_value(
                draw
            )
        else:
            holder.insert(key, odd_value(draw))
    elif how == "like":
        holder[key] = _alike(old, draw)
    elif how == "swap":
        other = draw.choice([p for p in places if len(p) == depth])
        for step in (there := document, *other[:-1]):
            there = there if step is document else there[step]
        with contextlib.suppress(LookupError, TypeError):
            holder[key], there[other[-1]] = there[other[-1]], holder[key]
    elif how == "deep":
        nested: Any = old
        for _ in range(draw.choice([2, 50])):
            nested = [nested] if draw.random() < 0.5 else {"x": nested}
        holder[key] = nested
    elif how == "key" and isinstance(holder, dict):
        renamed = draw.choice([key + "x", key.upper(), key[::-1], "../" + key, ""])
        holder[renamed] = holder.pop(key)
    else:
        holder[key] = odd_value(draw)
        return document, f"{where} = {str(holder[key])[:40]!r}"
    return document, f"{how} {where} ({str(old)[:40]!r})"


def _whole(document: Any, draw: random.Random) -> tuple[Any, str]:
    how = draw.choice(["odd", "deep", "nan", "twice", "wrapped"])
    if how == "deep":
        depth = draw.choice([1_000, 100_000])
        return _Text("[" * depth + "]" * depth), f"{depth} brackets"
    if how == "twice" and isinstance(document, dict) and document:
        key = draw.choice(list(document))
        text = json.dumps(document)
        return _Text(
            text[:-1] + f", {json.dumps(key)}: {json.dumps(odd_value(draw))}}}"
        ), f"{key} twice"
    if how == "wrapped":
        return [document], "in a list"
    return (float("nan") if how == "nan" else odd_value(draw)), f"whole: {how}"


def _alike(value: Any, draw: random.Random) -> Any:
    """Return a value of the same type that is another one: the damage that is hardest to see."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice([value + 1, value - 1, -value, value * 2, value * 1000, value << 40, 0])
    if isinstance(value, float):
        return draw.choice([-value, 0.0, value * 1e6, value * 1e-30, float("nan"), 1e300])
    if isinstance(value, str):
        return draw.choice([value + "x", value[:-1], value.upper(), "../" + value, "/" + value, ""])
    if isinstance(value, list):
        return draw.choice([value[1:], value * 2, value[::-1], [*value, odd_value(draw)]])
    if isinstance(value, dict):
        return dict(list(value.items())[1:])
    return odd_value(draw)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:50])
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def of_header(path: Path, draw: random.Random) -> str:
    """A safetensors file whose header says something that its bytes are not."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return of_bytes(path, draw)
    body = content[8 + length :]
    # What an earlier mutation left whole.
    parts = header if isinstance(header, dict) else {}
    names = [name for name, entry in parts.items() if _is_entry(entry)]
    how = draw.choice(["length", "json", "metadata", "metadata", "field", "field", "field", "body"])
    if how == "length":
        claimed = draw.choice(
            [0, 1, 8, length - 1, length + 1, len(content), 1 << 31, (1 << 64) - 1]
        )
        path.write_bytes(struct.pack("<Q", claimed % (1 << 64)) + content[8:])
        return f"header length {claimed}"
    if how == "json":
        header, what = of_value(header, draw)
    elif how == "metadata" and isinstance(parts.get("__metadata__"), dict):
        what = _metadata(header, draw)
    elif how == "body" and body:
        start = draw.randrange(len(body))
        values = draw.choice(
            [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", b"\0\0\x80\xbf", b"\xff" * 8]
        )
        start -= start % 4
        body = (body[:start] + values + body[start + len(values) :])[: len(body)]
        what = f"values {values.hex()} at {start}"
    elif names:
        what = _entry(header, draw.choice(names), names, draw)
    else:
        header, what = of_value(header, draw)
    text = (
        header if isinstance(header, _Text) else json.dumps(header, separators=(",", ":"))
    ).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return f"header {what}"


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"dtype", "shape", "data_offsets"} <= set(value)
        and all(isinstance(value[key], list) for key in ("shape", "data_offsets"))
        and all(type(number) is int for number in (*value["shape"], *value["data_offsets"]))
        and len(value["data_offsets"]) == 2
    )


def _is_json(text: Any) -> bool:
    if not isinstance(text, str) or text[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _metadata(header: dict[str, Any], draw: random.Random) -> str:
    metadata = header["__metadata__"]
    keys = [key for key, text in metadata.items() if _is_json(text)]
    if keys and draw.random() < 0.8:  # JSON in a text
        key = draw.choice(keys)
        changed, what = of_value(json.loads(metadata[key]), draw)
        metadata[key] = changed if isinstance(changed, _Text) else json.dumps(changed)
        return f"metadata {key}: {what}"
    header["__metadata__"], what = of_value(metadata, draw)
    return f"metadata {what}"


def _entry(header: dict[str, Any], name: str, names: list[str], draw: random.Random) -> str:
    entry = header[name]
    how = draw.choice(
        ["dtype", "shape", "reshape", "offsets", "overlap", "swap", "drop", "rename", "add"]
    )
    if how == "dtype":
        entry["dtype"] = draw.choice(DTYPES)
    elif how == "shape":
        entry["shape"] = draw.choice(
            [[], [0], [-1], [1 << 40, 1 << 40], [1, *entry["shape"]], "x", [1.5]]
        )
    elif how == "reshape":  # as many values
        total = 1
        for length in entry["shape"]:
            total *= length
        entry["shape"] = draw.choice(
            [[total], [1, total], [total, 1], entry["shape"][::-1], [*entry["shape"], 1]]
        )
    elif how == "offsets":
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = draw.choice(
            [[stop, start], [start, stop + 4], [-4, stop], [start, 1 << 62], [start], [0, 0]]
        )
    elif how == "overlap":
        entry["data_offsets"] = header[draw.choice(names)]["data_offsets"]
    elif how == "swap":
        other = draw.choice(names)
        header[name], header[other] = header[other], header[name]
    elif how == "drop":
        last = max(names, key=lambda n: header[n]["data_offsets"][1])
        del header[last if draw.random() < 0.5 else name]
    elif how == "rename":
        header[draw.choice([name + "x", name[1:], "../" + name, name.rpartition(".")[0], ""])] = (
            header.pop(name)
        )
    else:
        header[draw.choice(["extra", "a.b", "range.x", "0.0", name + ".1"])] = {
            "dtype": "F32",
            "shape": [0],
            "data_offsets": [0, 0],
        }
    return f"{how} of {name}"


_OF_CONSTANTS = ("dims", "dtype", "location", "offset", "raw", "drop", "twice", "rename")
_OF_NODES = ("node", "input", "op", "domain", "attribute", "cycle")


def of_graph(path: Path, draw: random.Random) -> str:
    """An ONNX file that can be parsed and says something else."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # noqa: BLE001  (damaged before)
        return of_bytes(path, draw)
    graph = model.graph
    how = draw.choice([*_OF_CONSTANTS, *_OF_NODES, "outputs", "inputs", "opset", "ir", "graph"])
    what = ""
    if how in _OF_CONSTANTS and graph.initializer:
        proto = draw.choice(graph.initializer)
        what = proto.name
        _constant(graph, proto, how, draw)
    elif how in _OF_NODES and graph.node:
        node = draw.choice(graph.node)
        what = node.name
        _node(graph, node, how, draw)
    elif how == "outputs" and graph.output:
        draw.choice(graph.output).name = draw.choice(["", "nothing"])
    elif how == "inputs" and graph.input:
        value = draw.choice(graph.input)
        if draw.random() < 0.5:
            value.type.Clear()
        else:
            value.name = "other"
    elif how == "opset":
        model.opset_import[0].version = draw.choice([0, 1, 6, 99, -1])
    elif how == "ir":
        model.ir_version = draw.choice([0, 1, 99])
    else:
        model.ClearField("graph")
        how = "no graph"
    path.write_bytes(model.SerializeToString())
    return f"graph {how} {what}"


def _node(graph: Any, node: Any, how: str, draw: random.Random) -> None:
    if how == "node":
        graph.node.remove(node)
    elif how == "input" and node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(
            ["", "nothing", graph.node[-1].output[0]]
        )
    elif how == "op":
        node.op_type = draw.choice(["", "Nothing", "Relu", "If", "Loop"])
    elif how == "domain":
        node.domain = draw.choice(["ai.nowhere", "com.microsoft"])
    elif how == "attribute" and node.attribute:
        attribute = draw.choice(node.attribute)
        attribute.i, attribute.f = draw.choice([-1, 1 << 62]), float("nan")
        attribute.ints[:] = [-1] * len(attribute.ints)
    elif node.input and node.output:
        node.input[0] = node.output[0]


def _constant(graph: Any, proto: Any, how: str, draw: random.Random) -> None:
    if how == "dims":
        proto.dims[:] = draw.choice(
            [[], [0], [-1], [1 << 31, 1 << 31], [*proto.dims, 2], [1 << 40], list(proto.dims)[::-1]]
        )
    elif how == "dtype":
        proto.data_type = draw.choice([0, 2, 7, 8, 10, 11, 16, 22, 99])
    elif how == "location":
        places = ["../outside", "/dev/zero", "/etc/passwd", "nothing", "", ".", "manifest.json"]
        raw = {"location": draw.choice(places)}
        _beside(proto, raw)
    elif how == "offset":
        held = {entry.key: entry.value for entry in proto.external_data} or {
            "location": "manifest.json"
        }
        held[draw.choice(["offset", "length"])] = draw.choice(["-1", "x", "", str(1 << 62), "3"])
        _beside(proto, held)
    elif how == "raw":
        proto.raw_data = draw.choice([b"", b"\0", proto.raw_data * 2, proto.raw_data[:-1]])
    elif how == "drop":
        graph.initializer.remove(proto)
    elif how == "twice":
        graph.initializer.add().CopyFrom(proto)
    else:
        proto.name = draw.choice(["", "other", "../x"])


def _beside(proto: Any, fields: dict[str, str]) -> None:
    proto.ClearField("raw_data")
    del proto.external_data[:]
    for key, value in fields.items():
        proto.external_data.add(key=key, value=value)
    proto.data_location = onnx.TensorProto.EXTERNAL


_CODE = "import pathlib; pathlib.Path({marker!r}).touch()\n"


def of_code(folder: Path, marker: Path, draw: random.Random) -> str:
    """Code of the folder's own: pickles, and modules that a config names.

    :param marker: file that the code makes if it is run.
    """
    # What pickle.dumps writes of an object whose __reduce__ calls exec: read, it runs the code.
    code = _CODE.format(marker=str(marker))
    pickled = f"cbuiltins\nexec\n(V{code.strip()}\ntR.".encode()
    how = draw.choice(
        ["pickle beside", "pickle alone", "named as safetensors", "auto_map", "generate"]
    )
    weights = sorted(folder.glob("*.safetensors"))
    if how.startswith("pickle"):
        for name in PICKLES:
            (folder / name).write_bytes(pickled)
        for path in weights if how == "pickle alone" else ():
            path.unlink()
    elif how == "named as safetensors":
        draw.choice(weights).write_bytes(pickled)
    else:
        for name in ("evil.py", "custom_generate/generate.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(code)
        for path in folder.glob("*config.json"):
            content = json.loads(path.read_bytes())
            names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
            content["auto_map"] = dict.fromkeys(names, "evil.Evil")
            content["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
            if draw.random() < 0.5:
                content["model_type"] = content["tokenizer_class"] = "evil"
            path.write_text(json.dumps(content))
    return f"code: {how}"


def reseal(folder: Path) -> None:
    """Make hashes right again: of sealed files, of the record of single things, of manifests."""
    for path in sorted(folder.rglob("*.safetensors")):
        if path.is_file() and not path.is_symlink():
            _seal(path)
    for path in sorted(folder.rglob(MANIFEST), key=lambda p: -len(p.parts)):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):
                _relist(path)


def _seal(path: Path) -> None:
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        tensors, fields = read_safetensors(path)
        if str(fields.get("format")).startswith("aimet_ext.tensors"):  # a checkpoint
            write_tensors(path, tensors, json.loads(fields["meta"]))
            return
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    seals = list(_SEAL.finditer(content[:end]))
    if len(seals) == 1:
        start, stop = seals[0].span(1)
        digest = hashlib.sha256(content[:start] + _ZEROS + content[stop:]).hexdigest().encode()
        path.write_bytes(content[:start] + digest + content[stop:])


def _relist(path: Path) -> None:
    content = json.loads(path.read_bytes())
    for name in list(content.get("files", ())):
        file = path.parent / name
        with contextlib.suppress(OSError, ValueError, TypeError):
            if file.is_file() and file.resolve().is_relative_to(path.parent.resolve()):
                content["files"][name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
            elif not file.exists():
                del content["files"][name]
    record = path.parent / "fingerprints.json"
    if "fingerprints" in content and record.is_file():
        content["fingerprints"] = hash_file(record)
    rest = {key: value for key, value in content.items() if key != "sha256"}
    content["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content), "utf-8")
