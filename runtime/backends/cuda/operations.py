"""What a bound graph enqueues, and the working memory that it shares between its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...cuda.array import DeviceArray, aligned
from ...cuda.device import Device
from ...cuda.launches import Launch
from ...errors import InvalidInput


@dataclass(frozen=True)
class Operation:
    """One call that enqueues work. name: of the kernel, or "product" or "convolution" with that of the layer."""

    name: str
    run: Callable[[], None]


def launch(device: Device, work: Launch) -> Operation:
    """The operation of a kernel of ours."""
    return Operation(work.name, lambda: device.launch(work))


class Pool:
    """Buffers that are taken and released again while a list of operations is made.

    It first measures: arrays have no memory, and the sizes of all buffers are recorded. `placed` is then the same pool
    in the memory of a block. Calls must come in the same order.
    """

    def __init__(self, block: DeviceArray | None = None, sizes: tuple[int, ...] = ()) -> None:
        self._block, self._sizes = block, list(sizes)
        self._free: list[int] = []
        self._taken: dict[
            int, tuple[int, DeviceArray]
        ] = {}  # by id of the array, which is kept so that its id is not reused
        self._made = 0
        self._named: dict[str, DeviceArray] = {}

    @property
    def measures(self) -> bool:
        """Whether no operation may be made, because arrays have no memory yet."""
        return self._block is None

    @property
    def nbytes(self) -> int:
        """The size of a block that holds all buffers."""
        return sum(map(aligned, self._sizes))

    def placed(self, block: DeviceArray) -> Pool:
        """This pool in the memory of a block of at least `nbytes`."""
        if block.nbytes < self.nbytes:
            raise ValueError(f"a block of {block.nbytes} bytes is too small for {self.nbytes}")
        return Pool(block, tuple(self._sizes))

    def take(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """An array in a free buffer."""
        if self._free:
            number = self._free.pop()
        else:
            number, self._made = self._made, self._made + 1
        size = DeviceArray(0, shape, dtype, None).nbytes
        if self._block is None:
            self._sizes += [0] * (number + 1 - len(self._sizes))
            self._sizes[number] = max(self._sizes[number], size)
            array = DeviceArray(0, shape, dtype, None)
        else:
            start = self._block.address + sum(map(aligned, self._sizes[:number]))
            array = DeviceArray(start, shape, dtype, self._block.memory)
        self._taken[id(array)] = number, array
        return array

    def name(self, name: str, array: DeviceArray) -> None:
        """Remember an array that is never released."""
        self._named[name] = array

    def named(self, name: str) -> DeviceArray:
        """The array of a name."""
        return self._named[name]

    def release(self, array: DeviceArray) -> None:
        """Let later arrays use the buffer of an array."""
        self._free.append(self._taken.pop(id(array))[0])


@dataclass(frozen=True)
class Made:
    """Operations, and what must live as long as they do: launches hold only addresses."""

    operations: tuple[Operation, ...]
    kept: tuple[object, ...]


class Operations:
    """A list of operations as a `Bound`. They are made when it first runs, when all working memory is known."""

    def __init__(self, name: str, make: Callable[[], Made]) -> None:
        self._name = name
        self._make: Callable[[], Made] | None = make
        self._made: Made | None = None

    @property
    def operations(self) -> tuple[Operation, ...]:
        """What it enqueues, in order. Raises InvalidInput if it is closed."""
        if self._make is None:
            got = f"This binding of {self._name} is closed."
            raise InvalidInput(got, expected="an open binding", fix="Bind the graph again.")
        if self._made is None:
            self._made = self._make()
        return self._made.operations

    def run(self) -> None:
        for operation in self.operations:
            operation.run()

    def close(self) -> None:
        self._make = self._made = None
