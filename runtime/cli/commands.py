"""Registers the runtime's subcommands."""

from __future__ import annotations

import typer

from .doctor import doctor
from .edit import edit
from .generate import generate
from .inspect import inspect


def register(app: typer.Typer) -> None:
    for command in (doctor, edit, generate, inspect):
        app.command()(command)
