"""`kernels.cu` on a CPU: compiled by a C compiler with stand-ins for CUDA's additions, and run through ctypes.

Blocks run one by one, and their threads run as fibers (host_shim.c). So barriers, warp operations, shared memory and
atomics work as on a GPU, and a thread that misses a barrier is an error. Addresses are those of NumPy arrays.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.compilation import KernelSet
from flexvar_runtime.cuda.launches import Launch

HERE = Path(__file__).parent
COMPILER = shutil.which("gcc") or shutil.which("cc")
# A fortified longjmp cannot leave the stack of a fiber
FLAGS = "-std=gnu11 -ffp-contract=off -fno-strict-aliasing -U_FORTIFY_SOURCE -fPIC -shared -Wall -Wno-unused-function"
_SIGNATURE = re.compile(r"^KERNEL\(\w+\)\s+(\w+)\(([^)]*)\)\s*\{", re.MULTILINE)
_TYPES = {
    "u32": ctypes.c_uint32,
    "int": ctypes.c_int32,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


class KernelFailed(AssertionError):
    """Threads missed a barrier or a warp operation. On a GPU the kernel would hang or corrupt memory."""


def parameters(source: str) -> dict[str, list[str]]:
    """Kernel to the types of its parameters: "*" for a pointer, else the C type."""
    types: dict[str, list[str]] = {}
    for name, text in _SIGNATURE.findall(source):
        types[name] = ["*" if "*" in one else one.split()[-2] for one in text.split(",")]
    return types


class HostKernels:
    """The kernels for one configuration, compiled in `directory`.

    block: threads in a block of `sample_rows`, instead of those of the configuration. source: instead of `kernels.cu`.
    level: the compiler's optimisation. Skips the test if there is no C compiler.
    """

    def __init__(
        self,
        config: KernelSet,
        directory: Path,
        *,
        block: int | None = None,
        source: str | None = None,
        level: str = "-O1",
    ) -> None:
        if COMPILER is None:
            pytest.skip("no C compiler here")
        self.config = config
        self.block: int | None = None  # of `sample_rows`
        defines = dict(config.defines())
        if "BLOCK" in defines:
            self.block = defines["BLOCK"] if block is None else block
            defines["BLOCK"] = self.block
        source = config.source if source is None else source
        self._parameters = parameters(source)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "kernels.c").write_text(f'#include "host_shim.h"\n#line 1 "kernels.cu"\n{source}\n{self._table()}')
        library = directory / "kernels.so"
        command = [COMPILER, level, *FLAGS.split(), f"-I{HERE}"]
        command += [f"-D{name}={value}" for name, value in defines.items()]
        built = subprocess.run(
            [*command, "-o", str(library), str(directory / "kernels.c"), "-lm"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert built.returncode == 0, built.stderr
        self._run = ctypes.PyDLL(str(library)).shim_run
        self._run.restype = ctypes.c_char_p
        triple, pointers = ctypes.c_uint * 3, ctypes.POINTER(ctypes.c_void_p)
        self._run.argtypes = [ctypes.c_char_p, triple, triple, pointers, ctypes.c_uint64]

    def _table(self) -> str:
        """C that calls every kernel with arguments from an array of their addresses."""
        lines = []
        for name, types in self._parameters.items():
            values = [f"*({'void *' if t == '*' else t} *)a[{i}]" for i, t in enumerate(types)]
            lines.append(f"static void call_{name}(void **a) {{ {name}({', '.join(values)}); }}")
        rows = ", ".join(f'{{"{name}", call_{name}}}' for name in self._parameters)
        lines.append(f"static const struct {{ const char *name; void (*call)(void **); }} shim_kernels[] = {{{rows}}};")
        return "\n".join([*lines, '#include "host_shim.c"', ""])

    def run(self, launch: Launch, *, order: int = 0) -> None:
        """Run a launch to its end. `order` selects the order of blocks, and that of warps between barriers.

        Raises KernelFailed if threads miss a barrier, TypeError if the arguments do not fit the kernel.
        """
        values = [self._value(kind, argument) for kind, argument in self._arguments(launch)]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        block = (self.block or 0, 1, 1) if launch.name == "sample_rows" else launch.block
        triple = ctypes.c_uint * 3
        error = self._run(launch.name.encode(), triple(*launch.grid), triple(*block), addresses, order)
        if error is not None:
            raise KernelFailed(f"{launch.name}: {error.decode()}")

    def _arguments(self, launch: Launch) -> list[tuple[str, Any]]:
        types = self._parameters[launch.name]
        if len(types) != len(launch.args):
            raise TypeError(f"{launch.name} takes {len(types)} arguments, not {len(launch.args)}")
        return list(zip(types, launch.args, strict=True))

    @staticmethod
    def _value(kind: str, argument: Any) -> Any:
        if kind == "*" and isinstance(argument, int):
            return ctypes.c_void_p(argument)
        if kind != "*" and type(argument) is _TYPES[kind]:
            return argument
        raise TypeError(f"{argument!r} for a parameter of type {kind}")


def device_array(array: NDArray[Any]) -> DeviceArray:
    """A NumPy array as a DeviceArray on the same memory."""
    assert array.flags.c_contiguous
    return DeviceArray(array.ctypes.data, array.shape, str(array.dtype), array)
