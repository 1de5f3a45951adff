"""Faults planted in an export: what a wrong tool, an interrupted copy or an old file would leave.

Every function changes files of a folder and says what a check must name. Sealed files are sealed
anew, so that only their content is wrong; :func:`cover_up` writes the manifest anew as well.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aimet_ext.files.manifest import relist_files
from aimet_ext.files.tensors import write_sealed

__all__ = ["FAULTS", "cover_up", "plant"]

QUANTIZERS, SCALES, LEDGER = (f"{name}.safetensors" for name in ("quantizers", "scales", "ledger"))
WEIGHTS = "model.safetensors"


def plant(kind: str, sound: Path, folder: Path, seed: int) -> set[str]:
    """Copy an export and plant a fault of a kind at a place that the seed chooses.

    :returns: names of which a check must name one.
    """
    shutil.copytree(sound, folder)
    return FAULTS[kind](folder, random.Random(f"{kind} {seed}"))


def cover_up(folder: Path, *, record: bool = False) -> None:
    """Write the manifest anew, as if the files were what they should be.

    :param record: take away what was recorded of single tensors, too.
    """
    if record:
        (folder / "fingerprints.json").unlink()
        path = folder / "manifest.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        del content["fingerprints"], content["sha256"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**content, "sha256": digest}), encoding="utf-8")
    relist_files(folder)


def dropped_bias(folder: Path, random: random.Random) -> set[str]:
    """A bias that one of the models no longer adds, by whatever mishap."""
    path = random.choice(sorted(folder.glob("*.onnx")))
    model = onnx.load(str(path), load_external_data=False)
    biases = [proto.name for proto in model.graph.initializer if proto.name.endswith("bias")]
    name = random.choice(sorted(biases))
    how = random.choice(["zero", "bypass", "remove"] + ["state"] * (folder / WEIGHTS).exists())
    if how == "state":
        tensors = load_file(folder / WEIGHTS)
        short = next(key for key in tensors if name.endswith(key))
        if random.random() < 0.5:
            del tensors[short]
        else:
            tensors[short] = tensors[short] * 0
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return {name, short}
    if how == "zero":
        proto = next(proto for proto in model.graph.initializer if proto.name == name)
        write_constant(path, proto, 0 * read_constant(path, proto))
    else:
        node = next(node for node in model.graph.node if name in node.input)
        if node.op_type == "Add":
            kept = next(item for item in node.input if item != name)
            for other in model.graph.node:
                for number, item in enumerate(other.input):
                    if item == node.output[0]:
                        other.input[number] = kept
            outputs = {value.name for value in model.graph.output}
            if node.output[0] in outputs:
                producer = next(other for other in model.graph.node if kept in other.output)
                producer.output[list(producer.output).index(kept)] = node.output[0]
            model.graph.node.remove(node)
        else:
            del node.input[2]
        if how == "remove":
            proto = next(proto for proto in model.graph.initializer if proto.name == name)
            model.graph.initializer.remove(proto)
    onnx.save(model, str(path))
    return {name, name.partition(".")[2]}


def wrong_sign(folder: Path, random: random.Random) -> set[str]:
    """An offset with its sign changed: in one of the encodings files or both, or in the sim's."""
    where = random.choice(["1.0.0", "2.0.0", "both", "quantizer"])
    older, newer = encodings_files(folder)
    if where == "quantizer":
        tensors, schema, fields = read_sealed(folder / QUANTIZERS)
        described = json.loads(fields["quantizers"])
        free = [n for n, d in described.items() if "same_as" not in d and not d["symmetric"]]
        if is_onnx(folder):
            free = [n for n in free if f"range.{n}" in tensors and described[n]["state"]["enabled"]]
            free = [n for n in free if bool((tensors[f"range.{n}"][:, 1] != 0).all())]
            name = random.choice(free)
            tensors[f"range.{name}"][:, 1] *= -1
        else:
            free = [n for n in free if float(tensors[f"{n}.min"].abs().max()) > 0]
            name = random.choice(free)
            low, high = tensors[f"{name}.min"], tensors[f"{name}.max"]
            tensors[f"{name}.min"], tensors[f"{name}.max"] = -high, -low
        write_sealed(folder / QUANTIZERS, schema, tensors, fields)
        return {name}
    one, two = json.loads(older.read_text()), json.loads(newer.read_text())
    with_sign = {e["name"]: e for e in two["encodings"] if np.any(e.get("y_zero_point", 0))}
    both = {e["name"]: e for e in one["param_encodings"] + one["activation_encodings"]}
    both = {name: e for name, e in both.items() if np.any(e["offset"])}
    names = sorted(both) if where == "1.0.0" else sorted(set(with_sign) & set(both))
    name = random.choice(names)
    if where != "2.0.0":
        both[name]["offset"] = [-offset for offset in both[name]["offset"]]
        older.write_text(json.dumps(one))
    if where != "1.0.0":
        zero = np.asarray(with_sign[name]["y_zero_point"])
        with_sign[name]["y_zero_point"] = (-zero).tolist()
        newer.write_text(json.dumps(two))
    return {name}


def swapped_scales(folder: Path, random: random.Random) -> set[str]:
    """Encodings of two tensors, ranges of two quantizers, or vectors of two modules, exchanged."""
    where = random.choice(["1.0.0", "2.0.0", "both", "quantizers", "scales"])
    if where in ("quantizers", "scales"):
        path = folder / (QUANTIZERS if where == "quantizers" else SCALES)
        tensors, schema, fields = read_sealed(path)
        names = [n for n in tensors if not n.endswith((".min", ".max")) and "sample" not in n]
        if where == "quantizers" and not is_onnx(folder):
            names = [n for n in tensors if n.endswith(".max")]
        one, two = exchangeable(random, {n: tensors[n] for n in names})
        pairs = [(one, two)]
        if one.endswith(".max"):
            pairs.append((one[:-3] + "min", two[:-3] + "min"))
        for mine, theirs in pairs:
            tensors[mine], tensors[theirs] = tensors[theirs], tensors[mine]
        write_sealed(path, schema, tensors, fields)
        short = {name.removesuffix(".max").removeprefix("range.") for name in (one, two)}
        return {one, two, *short}
    files = dict(zip(("1.0.0", "2.0.0"), encodings_files(folder), strict=True))
    found = {version: json.loads(path.read_text()) for version, path in files.items()}
    lists = {
        "1.0.0": found["1.0.0"]["param_encodings"] + found["1.0.0"]["activation_encodings"],
        "2.0.0": found["2.0.0"]["encodings"],
    }
    common = {e["name"] for e in lists["1.0.0"]} & {e["name"] for e in lists["2.0.0"]}
    entries = {e["name"]: np.asarray(e["scale"]) for e in lists["1.0.0"] if e["name"] in common}
    one, two = exchangeable(random, entries)
    for version in found if where == "both" else [where]:
        mine = next(e for e in lists[version] if e["name"] == one)
        theirs = next(e for e in lists[version] if e["name"] == two)
        mine_was, theirs_was = dict(mine), dict(theirs)
        mine.clear(), theirs.clear()
        mine.update(theirs_was, name=one)
        theirs.update(mine_was, name=two)
        files[version].write_text(json.dumps(found[version]))
    return {one, two}


def stale_encodings(folder: Path, random: random.Random) -> set[str]:
    """A weight that was trained on, or encodings that an earlier calibration left."""
    where = random.choice(["weight", "encodings", "everything"])
    older, newer = encodings_files(folder)
    one, two = json.loads(older.read_text()), json.loads(newer.read_text())
    if where == "weight":
        path = folder / f"{older.stem}.onnx"
        model = onnx.load(str(path), load_external_data=False)
        encoded = {e["name"] for e in one["param_encodings"]}
        protos = [p for p in model.graph.initializer if p.name in encoded and len(p.dims) == 2]
        proto = random.choice(sorted(protos, key=lambda proto: proto.name))
        before = read_constant(path, proto)
        factor = np.float32(random.choice([0.9, 1.02, 1.3]))
        write_constant(path, proto, before * factor)
        onnx.save(model, str(path))
        names = {proto.name}
        if (folder / WEIGHTS).exists():
            tensors = load_file(folder / WEIGHTS)
            for name, tensor in tensors.items():
                for turned in (before, before.T):
                    if tensor.shape == turned.shape and np.array_equal(tensor.numpy(), turned):
                        tensors[name] = tensor * float(factor)
                        names.add(name)
            save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return names
    ratio = random.choice([0.8, 1.05, 1.5])
    entries = {e["name"]: e for e in one["param_encodings"] + one["activation_encodings"]}
    name = random.choice(sorted(entries))
    entries[name]["scale"] = [ratio * scale for scale in entries[name]["scale"]]
    older.write_text(json.dumps(one))
    for entry in two["encodings"]:
        if entry["name"] == name:
            key = "y_scale" if "y_scale" in entry else "per_channel_float_scale"
            entry[key] = (ratio * np.asarray(entry[key])).tolist()
    newer.write_text(json.dumps(two))
    if where == "everything":
        tensors, schema, fields = read_sealed(folder / QUANTIZERS)
        owner = owner_of(folder, name)
        for key in tensors:
            if key in (f"{owner}.min", f"{owner}.max"):
                tensors[key] = tensors[key] * ratio
            if key == f"range.{name}":
                tensors[key][:, [0, 2, 3]] *= ratio
        write_sealed(folder / QUANTIZERS, schema, tensors, fields)
        return {name, owner}
    return {name}


def truncated_data(folder: Path, random: random.Random) -> set[str]:
    """Weights beside a model, cut off somewhere."""
    path = random.choice(sorted(folder.glob("*.onnx.data")))
    size = path.stat().st_size
    model = onnx.load(str(path.with_suffix("")), load_external_data=False)
    ends = {}
    for proto in model.graph.initializer:
        fields = {entry.key: entry.value for entry in proto.external_data}
        if fields:
            ends[proto.name] = int(fields.get("offset", 0)) + int(fields["length"])
    last = max(ends.values())
    keep = random.choice([last - 1, last - random.randrange(1, last), random.randrange(last), 0])
    with path.open("rb+") as file:
        file.truncate(min(keep, size))
    return {name for name, end in ends.items() if end > keep}


def tampered_scales(folder: Path, random: random.Random) -> set[str]:
    """A scales file with a value changed, a vector gone, or a byte flipped and not sealed."""
    path = folder / SCALES
    tensors, schema, fields = read_sealed(path)
    name = random.choice(sorted(tensors))
    how = random.choice(["value", "last bit", "scaled", "gone", "byte", "ledger", "techniques"])
    if how == "byte":
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[random.randrange(start, len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)
        return {SCALES}
    if how == "ledger":
        tensors, schema, fields = read_sealed(folder / LEDGER)
        key = random.choice(sorted(tensors))
        tensors[key][random.randrange(len(tensors[key]))] *= 1.01
        write_sealed(folder / LEDGER, schema, tensors, fields)
        number, place = map(int, key.split("."))
        return {json.loads(fields["ledger"])["entries"][number]["sides"][place][0]}
    if how == "techniques":
        fields["techniques"] = '["another"]'
        write_sealed(path, schema, tensors, fields)
        return {SCALES}
    vector = tensors[name]
    place = random.randrange(len(vector))
    if how == "value":
        vector[place] *= 1.5
    elif how == "last bit":
        vector.numpy().view(np.int32)[place] ^= 1
    elif how == "scaled":
        vector *= 2
    else:
        del tensors[name]
    write_sealed(path, schema, tensors, fields)
    return {name}


FAULTS: dict[str, Callable[[Path, random.Random], set[str]]] = {
    "dropped bias": dropped_bias,
    "wrong offset sign": wrong_sign,
    "swapped scales": swapped_scales,
    "stale encodings": stale_encodings,
    "truncated external data": truncated_data,
    "tampered scales file": tampered_scales,
}


def is_onnx(folder: Path) -> bool:
    """Whether it is the export of an ONNX sim."""
    return not (folder / WEIGHTS).exists()


def encodings_files(folder: Path) -> tuple[Path, Path]:
    """Of version 1.0.0 and of 2.0.0."""
    newer = next(folder.glob("*.2.0.0.encodings"))
    return folder / newer.name.replace(".2.0.0", ""), newer


def owner_of(folder: Path, tensor: str) -> str:
    """The quantizer of an encoded tensor, as the export recorded it."""
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    owner = content.get("quantizer_of", {}).get(tensor, tensor)
    fields = read_sealed(folder / QUANTIZERS)[2]
    return json.loads(fields["quantizers"]).get(owner, {}).get("same_as", owner)


def exchangeable(random: random.Random, values: dict[str, Any]) -> tuple[str, str]:
    """Two names whose values have one shape and are different."""
    names = sorted(values)
    while True:
        one = random.choice(names)
        fits = [n for n in names if values[n].shape == values[one].shape]
        fits = [n for n in fits if not bool((values[n] == values[one]).all())]
        if fits:
            return one, random.choice(fits)


def read_sealed(path: Path) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Tensors, schema and fields of a sealed file."""
    with safe_open(path, "pt") as file:
        fields = dict(file.metadata())
    del fields["sha256"]
    return {n: t.clone() for n, t in load_file(path).items()}, fields.pop("schema"), fields


def read_constant(path: Path, proto: Any) -> Any:
    """Values of an initializer, wherever they lie."""
    return onnx.numpy_helper.to_array(proto, base_dir=str(path.parent)).copy()


def write_constant(path: Path, proto: Any, values: Any) -> None:
    """Put values into an initializer, or into the file beside the model."""
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        fields = {entry.key: entry.value for entry in proto.external_data}
        with (path.parent / fields["location"]).open("rb+") as file:
            file.seek(int(fields.get("offset", 0)))
            file.write(np.ascontiguousarray(values).tobytes())
        return
    proto.CopyFrom(onnx.numpy_helper.from_array(values, proto.name))
