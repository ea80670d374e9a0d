"""The command line, run in this process."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import typer

from flexvar_runtime.cli.application import GROUP
from flexvar_runtime.cli.main import main

LOGGERS = ("flexvar_runtime", "flexvar_export", "flexvar_bench")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: Any
    out: str
    err: str

    def refused(self, code: int, *names: object) -> bool:
        """Whether it ended with this code, and with one line of error on standard error that has all the names."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return self.code == code and len(errors) == 1 and all(str(name) in errors[0] for name in names)

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)


Flexvar = Callable[..., Ended]


@pytest.fixture
def flexvar(capsys: pytest.CaptureFixture[str]) -> Iterator[Flexvar]:
    """flexvar("doctor", "--json") -> how it ended."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(end.value.code, captured.out, captured.err)

    before = {name: logging.getLogger(name).__dict__.copy() for name in LOGGERS}
    yield run
    for name, state in before.items():
        logging.getLogger(name).__dict__.update(state)


Register = Callable[[typer.Typer], None]


class Entry:
    """The entry point of an installed package that has commands."""

    def __init__(self, name: str, register: Register) -> None:
        self.name, self.register = name, register

    def load(self) -> Register:
        return self.register


@pytest.fixture
def install_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Make a function a command of another package, beside those of the runtime."""

    def install(command: Callable[..., None]) -> None:
        def register(app: typer.Typer) -> None:
            app.command()(command)

        def entry_points(group: str) -> list[Any]:
            assert group == GROUP
            return [Entry("zzz", register), *[entry for entry in real(group=group) if entry.name == "runtime"]]

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    real = importlib.metadata.entry_points
    return install
