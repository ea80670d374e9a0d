"""Graphs that were exported before, for the tests: torch.onnx.export takes nine tenths of an export.

What is traced depends on a module's parts and the shapes and types of its weights, not on the weights' values. A graph
is exported for real when a run first asks for one of its form; later ones are copies with other weights. Tests of the
exporter itself do not come here, and test_graph_cache.py shows that a copy is what an export would have written.
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

FOLDER = "FLEXVAR_TEST_GRAPHS"  # the variable that names the folder to processes that tests start
SMALL = 64  # bytes: shapes, axes and factors of the exporter's own
EXTERNAL = onnx.TensorProto.EXTERNAL
export_for_real = onnx_graphs.export_graph


class GraphCache:
    """A folder of graphs that processes share, each in a folder called by its form."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process takes its graphs from here (see sitecustomize.py)."""
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {FOLDER: str(self.folder), "PYTHONPATH": os.pathsep.join(paths)}

    def export_graph(
        self, module: nn.Module, spec: GraphSpec, directory: Path, weights_of: GraphSpec | None = None
    ) -> None:
        """As `flexvar_export.onnx_graphs.export_graph`."""
        state = {name: _bytes(value) for name, value in module.state_dict().items()}
        key = form(module, f"{spec!r} {weights_of and weights_of.file}")
        with locked(self.folder / f"{key}.lock"):
            known = self.folder / key
            if not known.exists():
                export_for_real(module, spec, directory, weights_of)
                if _nothing_else(directory / spec.file, state):
                    partial = self.folder / f"{key}.partial"
                    partial.mkdir()
                    for path in directory.glob(f"{spec.file}*"):
                        shutil.copy(path, partial)
                    partial.rename(known)
                return
        for path in known.iterdir():
            shutil.copy(path, directory)
        _put(directory / spec.file, state)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def form(module: nn.Module, how: str) -> str:
    """A digest of all that a graph depends on, weights apart: but which of them are equal, and which hold one value
    only, because the exporter keeps such once."""
    digest = hashlib.sha256(how.encode())
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


def _nothing_else(path: Path, state: dict[str, bytes]) -> bool:
    """Whether a graph's weights are those of the module by name, and what else it holds is no work of theirs."""
    for tensor in onnx.load(str(path)).graph.initializer:
        content = tensor.raw_data
        if tensor.name in state:
            if content != state[tensor.name]:
                return False
        elif len(content) > SMALL and len(set(content[i : i + 2] for i in range(0, len(content), 2))) > 2:
            return False
    return True


def _put(path: Path, state: dict[str, bytes]) -> None:
    """Write weights into a graph and its file of weights; those in another graph's file must stand there."""
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
                raise AssertionError(f"{path}: other weights {tensor.name} in {where['location']}")
    onnx.save_model(model, str(path))
