"""A cache of exported graphs for the tests, because torch.onnx.export takes nine tenths of the time of an export.

A traced graph depends on the parts of a module and on the shapes and types of its weights, but not on their values. The
first export of a form in a test run is a real one. Later ones are copies with other weights. Tests of the exporter do
not use the cache. test_graph_cache.py shows that a copy equals the result of an export.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import nn

from flexvar_export import onnx_graphs
from flexvar_runtime.model.tensors import GraphSpec

FOLDER = "FLEXVAR_TEST_GRAPHS"  # environment variable that tells child processes the folder of the cache
SMALL = 64  # bytes; shapes, axes and factors that the exporter adds are not larger
EXTERNAL = onnx.TensorProto.EXTERNAL
export_for_real = onnx_graphs.export_graph


class GraphCache:
    """A folder of graphs that processes share. Every graph has a subfolder named by its form."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which a child process uses this cache (see sitecustomize.py)."""
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {FOLDER: str(self.folder), "PYTHONPATH": os.pathsep.join(paths)}

    def export_graph(
        self, module: nn.Module, spec: GraphSpec, directory: Path, weights_of: GraphSpec | None = None
    ) -> None:
        """Do the same as `flexvar_export.onnx_graphs.export_graph`, from the cache where possible."""
        state = {name: _bytes(value) for name, value in module.state_dict().items()}
        key = form(module, f"{spec!r} {weights_of and weights_of.file}")
        with locked(self.folder / f"{key}.lock"):
            known = self.folder / key
            if not known.exists():
                export_for_real(module, spec, directory, weights_of)
                if _holds_only(directory / spec.file, state):
                    partial = self.folder / f"{key}.partial"
                    partial.mkdir()
                    for path in directory.glob(f"{spec.file}*"):
                        shutil.copy(path, partial)
                    partial.rename(known)
                return
        for path in known.iterdir():
            shutil.copy(path, directory)
        _write_weights(directory / spec.file, state)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, so that one process at a time runs the body."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def form(module: nn.Module, declaration: str) -> str:
    """A digest of everything that a graph depends on except the values of its weights.

    It includes which weights are equal, and which hold a single value, because the exporter stores these only once.
    """
    digest = hashlib.sha256(declaration.encode())
    for name, part in module.named_modules():
        plain = {key: value for key, value in vars(part).items() if key[0] != "_" or key == "_modules"}
        settings = {key: value for key, value in plain.items() if not isinstance(value, nn.Module | dict)}
        digest.update(f"{name} {type(part).__module__}.{type(part).__qualname__} {sorted(settings.items())!r}".encode())
    seen: dict[bytes, str] = {}
    for name, value in module.state_dict().items():
        content = _bytes(value)
        first = seen.setdefault(hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + content).digest(), name)
        single = content[: value.element_size()]
        uniform = single.hex() if content == single * value.numel() else ""
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {first} {uniform}".encode())
    return digest.hexdigest()


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _holds_only(path: Path, state: dict[str, bytes]) -> bool:
    """Whether a graph holds the weights of the module by name, and no large constant that was computed from them."""
    for tensor in onnx.load(str(path)).graph.initializer:
        content = tensor.raw_data
        if tensor.name in state:
            if content != state[tensor.name]:
                return False
        elif len(content) > SMALL and len(set(content[i : i + 2] for i in range(0, len(content), 2))) > 2:
            return False
    return True


def _write_weights(path: Path, state: dict[str, bytes]) -> None:
    """Write weights into a graph and its file of weights. Weights in the file of another graph must be equal."""
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        content = state.get(tensor.name)
        if content is None:
            continue
        if tensor.data_location != EXTERNAL:
            tensor.raw_data = content
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        own = where["location"] == f"{path.name}.data"
        with (path.parent / where["location"]).open("r+b" if own else "rb") as file:
            file.seek(int(where["offset"]))
            if own:
                file.write(content)
            elif file.read(len(content)) != content:
                raise AssertionError(f"{path}: the weights {tensor.name} in {where['location']} differ")
    onnx.save_model(model, str(path))
