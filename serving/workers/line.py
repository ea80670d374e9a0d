"""The connection of a worker to the service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection


class ConnectionEnded(Exception):
    """The service has ended."""


class Line:
    """A connection whose end raises ConnectionEnded. So it is not taken for an error of the model, or the reverse."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, message: object) -> None:
        with _ends():
            self._connection.send(message)

    def receive(self) -> object:
        with _ends():
            return self._connection.recv()

    def poll(self) -> bool:
        with _ends():
            return self._connection.poll()


@contextmanager
def _ends() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise ConnectionEnded from error
