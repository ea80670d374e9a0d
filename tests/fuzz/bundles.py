"""Mutated bundles: bytes, graphs, tables, manifest and the set of files, under hashes that agree or not."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from mutate import mutate_bytes, mutate_json, mutate_message
from outcome import Wrong, refused

from flexvar_runtime import FlexVARPipeline

MANIFEST = "manifest.json"
REQUEST: dict[str, Any] = {"labels": [1, 3], "schedule": "1_2_3", "seed": 7}
BACKENDS = ("ort-cpu", "ort-cpu", "ort-cpu", "openvino")
MEANING = ("defaults", "model")  # parts of the manifest that change images, and that no hash but its own covers
ARRAYS: tuple[Callable[[Any], Any], ...] = (
    lambda array: array[:-1],
    lambda array: array.astype(np.float64),
    lambda array: array.astype(np.float16),
    lambda array: array * np.nan,
    lambda array: array[None],
    lambda array: np.zeros((0,), array.dtype),
    lambda array: np.array(["a"]),
    lambda array: np.broadcast_to(array, (2, *array.shape)),
    lambda array: array.T,
)


def mutate(bundle: Path, rng: Random) -> tuple[bool, str]:
    """Change a bundle in one way. Returns whether its images must stay the same, and what was changed.

    True: the bundle must be refused, or give the images of the original. False: content and hashes were changed
    together, so other images are correct too.
    """
    files = sorted(path.name for path in bundle.iterdir() if path.name != MANIFEST)
    kind = rng.choice(("bytes", "message", "message", "message", "tables", "json", "json", "text", "files"))
    if kind == "json":
        document, where = mutate_json(json.loads((bundle / MANIFEST).read_bytes()), rng)
        (bundle / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
        return where[0] not in MEANING, f"manifest {where}"
    if kind == "text":
        (bundle / MANIFEST).write_bytes(mutate_bytes((bundle / MANIFEST).read_bytes(), rng))
        return False, "bytes of the manifest"
    if kind == "files":
        return True, _change_files(bundle, rng.choice(files), rng)
    if kind == "message":
        files = [name for name in files if name.endswith(".onnx")]
    if kind == "tables":
        files = [name for name in files if name.endswith(".npz")]
    name = rng.choice(files)
    data = (bundle / name).read_bytes()
    change = {"bytes": mutate_bytes, "message": mutate_message, "tables": _mutate_npz}[kind]
    (bundle / name).write_bytes(change(data, rng))
    seal, record = rng.random() < 0.85, rng.random() < 0.7
    if seal:
        whole = reseal(bundle, name, record)
    return not (seal and whole), f"{kind} of {name}, {'sealed' if seal else 'not sealed'}, record {record}"


def reseal(bundle: Path, name: str, record: bool) -> bool:
    """Write size and sha256 of a file to the manifest. record: also to the record of the comparison, if it names files.

    Returns whether all hashes agree.
    """
    data = (bundle / name).read_bytes()
    document = json.loads((bundle / MANIFEST).read_bytes())
    digest = hashlib.sha256(data).hexdigest()
    document["files"][name] = {"size": len(data), "sha256": digest}
    proved = document["parity"].get("files", {})
    if record and name in proved:
        proved[name] = digest
    (bundle / MANIFEST).write_text(json.dumps(document, indent=1, sort_keys=True), encoding="utf-8")
    return proved.get(name, digest) == digest


def _change_files(bundle: Path, name: str, rng: Random) -> str:
    """Change the set of files. The manifest stays."""
    path, kind = bundle / name, rng.randrange(9)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.rename(bundle / rng.choice((name.upper(), f"{name} ", f".{name}", "engines")))
    elif kind == 2:
        new = rng.choice(("extra.onnx", "README.md", "model.sig", ".gitattributes", "engines", "a\nb"))
        (bundle / new).write_text("x")
    elif kind == 3:
        path.rename(bundle.parent / name)
        path.symlink_to(bundle.parent / name)
    elif kind == 4:
        path.unlink()
        path.mkdir()
    elif kind == 5:
        path.unlink()
        os.mkfifo(path)
    elif kind == 6:
        (bundle / rng.choice(("engines", "sub", ".git"))).mkdir()
    elif kind == 7:
        other = rng.choice(sorted(each for each in bundle.iterdir() if each != path))
        path.rename(bundle.parent / "kept")
        other.rename(path)
        (bundle.parent / "kept").rename(other)
    else:
        path.write_bytes(b"")
    return f"file set {kind} with {name}"


def _mutate_npz(data: bytes, rng: Random) -> bytes:
    """An archive of arrays with one of them changed, removed or added, or compressed or with an entry repeated."""
    arrays = dict(np.load(io.BytesIO(data)))
    name, kind, target = rng.choice(sorted(arrays)), rng.randrange(6), io.BytesIO()
    if kind == 0:
        return mutate_bytes(data, rng)
    if kind == 1:
        del arrays[name]
    elif kind == 2:
        arrays["added"] = arrays[name]
    elif kind < 5:
        arrays[name] = rng.choice(ARRAYS)(arrays[name])
    save = np.savez_compressed if rng.random() < 0.1 else np.savez
    save(target, **arrays)
    if kind == 5:
        with zipfile.ZipFile(target, "a") as archive:
            archive.writestr(rng.choice((f"{name}.npy", "../out.npy", "evil.txt", f"{name}.NPY")), b"x" * 100)
    return target.getvalue()


def prepare(desk: Path) -> None:
    global expected
    expected = {name: images(desk / "tiny.bundle", name) for name in set(BACKENDS)}


def images(bundle: Path, backend: str) -> Any:
    """The images of REQUEST, and their tokens encoded again."""
    with FlexVARPipeline.from_bundle(bundle, backend, threads=1) as pipeline:
        made = pipeline(**REQUEST).images
        return made, pipeline.encode(made)


def _case(desk: Path, case: Path, seed: int) -> tuple[str, bool, str]:
    """Write the bundle of a seed. Returns its backend, whether only its own images are right, and what was changed."""
    rng = Random(seed)
    shutil.copytree(desk / "tiny.bundle", case / "tiny.bundle")
    backend = rng.choice(BACKENDS)
    exact, what = mutate(case / "tiny.bundle", rng)
    return backend, exact, what


def show(desk: Path, seed: int) -> str:
    """What the seed changes."""
    case = desk.parent / f"bundles-{seed}-shown"
    try:
        backend, _, what = _case(desk, case, seed)
    finally:
        shutil.rmtree(case, ignore_errors=True)
    return f"{what}; {backend}"


def run(desk: Path, case: Path, seed: int) -> str:
    """Open the bundle of a seed and make its images. Returns how it ended. Raises Wrong."""
    case.mkdir()
    backend, exact, _ = _case(desk, case, seed)
    found: list[Any] = []
    ended = refused(lambda: found.append(images(case / "tiny.bundle", backend)))
    if ended is not None:
        return ended
    [(made, tokens)] = found
    right, encoded = expected[backend]
    if made.shape[0] != len(right) or made.dtype != np.uint8:
        raise Wrong(f"images of shape {made.shape} and dtype {made.dtype}")
    if exact and not (np.array_equal(made, right) and np.array_equal(tokens, encoded)):
        raise Wrong("other images than those of the bundle")
    return "same images" if np.array_equal(made, right) else "other images"
