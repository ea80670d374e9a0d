"""Standard output and standard error that are closed, full, without a reader, or of a small encoding."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from flexvar_runtime import InvalidInput
from flexvar_runtime.cli.console import JsonOption, emit, err, out, say
from flexvar_runtime.cli.streams import OutputLost, protected

FULL = Path("/dev/full")
RESULTS: dict[str, Callable[[], None]] = {
    "a line": lambda: say("a result"),
    "a table": lambda: out.print(Table("a", "b")),
    "much": lambda: say("x" * 100_000),
}


@pytest.fixture
def command(install_command: Any) -> Callable[[Callable[[], None]], None]:
    """Make a function that prints a result the command `work`."""

    def install(show: Callable[[], None]) -> None:
        def work(as_json: JsonOption = False) -> None:
            emit({"name": "\udce9"}, as_json, show)

        install_command(work)

    return install


def nobody_reads() -> io.TextIOWrapper:
    """A pipe whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("json", [[], ["--json"]])
@pytest.mark.parametrize("kind", RESULTS)
def test_a_full_disk_is_an_error_of_the_environment(
    flexvar: Any, command: Any, monkeypatch: pytest.MonkeyPatch, kind: str, json: list[str]
) -> None:
    command(RESULTS[kind])
    with FULL.open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert flexvar("work", *json).refused(4, "standard output", "No space left")


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["work"], ["work", "--help"]])
def test_a_full_disk_without_a_buffer(
    flexvar: Any, command: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Then the first failure is that of an empty text, with which click tries whether a stream takes text."""
    command(RESULTS["a line"])
    with FULL.open("wb", buffering=0) as raw:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=True))
        assert flexvar(*arguments).refused(4, "standard output", "No space left")


@pytest.mark.parametrize("kind", [*RESULTS, "--json", "--help"])
def test_a_reader_that_is_gone_ends_the_command_quietly(
    flexvar: Any, command: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    command(RESULTS.get(kind, RESULTS["a line"]))
    with nobody_reads() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        ended = flexvar("work", *([kind] if kind.startswith("--") else []))
    assert (ended.code, ended.err) == (141, "")


@pytest.mark.parametrize("arguments", [["work"], ["work", "--json"], ["--version"], ["--help"]])
def test_a_closed_output_takes_everything(
    flexvar: Any, command: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Python has no stream then."""
    command(RESULTS["a table"])
    monkeypatch.setattr(sys, "stdout", None)
    ended = flexvar(*arguments)
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize("arguments", [["refuse"], ["refuse", "--json"], ["nonsense"], ["refuse", "--colour"]])
@pytest.mark.parametrize("stream", ["closed", "full", "no reader"])
def test_a_refusal_keeps_its_exit_code_if_it_cannot_be_printed(
    flexvar: Any, install_command: Any, monkeypatch: pytest.MonkeyPatch, stream: str, arguments: list[str]
) -> None:
    def refuse(as_json: JsonOption = False) -> None:
        say("progress", err)
        raise InvalidInput("a [/wrong] value.", expected="another", fix="Pass another.")

    if stream == "full" and not FULL.exists():
        pytest.skip("there is no /dev/full here")
    install_command(refuse)
    lost = {"closed": lambda: None, "full": lambda: FULL.open("w"), "no reader": nobody_reads}[stream]()
    monkeypatch.setattr(sys, "stderr", lost)
    assert flexvar(*arguments).code == 2
    monkeypatch.undo()
    if lost is not None:
        lost.close()


@pytest.mark.parametrize(
    ("encoding", "errors", "printed"),
    [
        ("utf-8", "strict", "фото caf\udce9 [/a] \t:cat:\n".encode("utf-8", "surrogateescape")),
        ("ascii", "strict", rb"\u0444\u043e\u0442\u043e caf" + b"\xe9 [/a] \t:cat:\n"),
        ("latin-1", "replace", rb"\u0444\u043e\u0442\u043e caf" + b"\xe9 [/a] \t:cat:\n"),
    ],
)
def test_names_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, printed: bytes) -> None:
    """The bytes of a name stay as they are, also brackets, tabs and colons. What has no byte is escaped."""
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding, errors)
    monkeypatch.setattr(sys, "stdout", stream)
    with protected():
        say("фото caf\udce9 [/a] \t:cat:")
    stream.flush()
    assert content.getvalue() == printed and stream.errors == errors


def test_output_that_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later write fails too, in case a library has caught the error. The end of Python does not fail again."""
    if not FULL.exists():
        pytest.skip("there is no /dev/full here")
    with FULL.open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with protected():
            sys.stdout.write("a result\n")
            for text in ("", "more\n"):
                with pytest.raises(OutputLost):
                    sys.stdout.flush()
                with pytest.raises(OutputLost):
                    sys.stdout.write(text)
        stream.flush()


NAMES = ["[/a]", "[bold]x", "[v2]", ":cat:", r"\[a]", "a [link=x]b"]


@pytest.mark.parametrize("name", NAMES)
def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """In lines, tables, progress and errors: nothing is markup or the code of an emoji."""
    say(name)
    table = Table("name", title=name)
    table.add_row(name)
    out.print(table)
    say(name, err)
    captured = capsys.readouterr()
    assert captured.out.count(name) == 3 and captured.err == f"{name}\n"


@pytest.mark.parametrize("control", ["\x1b[31m", "\x07", "\r", "\x9b"])
def test_messages_show_control_characters_escaped(capsys: pytest.CaptureFixture[str], control: str) -> None:
    say(f"error: a{control}b", err)
    shown = capsys.readouterr().err
    assert shown == f"error: a{control.encode('unicode_escape').decode()}b\n"
