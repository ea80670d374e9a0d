"""The command as a whole: its subcommands, exit codes and output streams."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

import pytest
import typer
from rich.console import Console

from flexvar_runtime import ArtifactRefused, BackendUnavailable, InvalidInput, OutOfMemory, ParityFailed, __version__
from flexvar_runtime.cli import console
from flexvar_runtime.cli.console import JsonOption, emit, out, steps


def test_version(flexvar: Any) -> None:
    ended = flexvar("--version")
    assert (ended.code, ended.out, ended.err) == (0, f"flexvar {__version__}\n", "")


def test_the_installed_command() -> None:
    [script] = importlib.metadata.entry_points(group="console_scripts", name="flexvar")
    assert script.value == "flexvar_runtime.cli.main:main"


def test_help_lists_the_commands_of_every_package(flexvar: Any) -> None:
    ended = flexvar("--help")
    assert ended.code == 0
    for command in ("doctor", "generate", "inspect", "export", "verify"):
        assert f"  {command} " in ended.out
    assert ended.out.index("  generate ") < ended.out.index("  verify ")  # the runtime's first


def test_without_a_command_it_helps(flexvar: Any) -> None:
    ended = flexvar()
    assert ended.code == 2 and "Usage: flexvar" in ended.out + ended.err


def test_a_package_registers_its_command(flexvar: Any, install_command: Any) -> None:
    def hello(name: str, as_json: JsonOption = False) -> None:
        """Greet."""
        emit({"name": name}, as_json, lambda: out.print(f"hello {name}", markup=False))

    install_command(hello)
    assert "  export " not in flexvar("--help").out
    assert flexvar("hello", "you").out == "hello you\n"
    assert flexvar("hello", "you", "--json").json == {"name": "you"}
    assert flexvar("doctor").code == 0


def refusal(kind: type[Any]) -> Any:
    return kind("[bold]this[/bold]\n" + "long " * 40 + "line", expected="[that]", fix="pip install 'x[cpu]'")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (refusal(InvalidInput), 2),
        (refusal(ParityFailed), 3),
        (refusal(BackendUnavailable), 4),
        (refusal(ArtifactRefused), 5),
        (refusal(OutOfMemory), 6),
    ],
)
def test_refusals(flexvar: Any, install_command: Any, error: Any, code: int) -> None:
    """One line on standard error that is neither wrapped nor read as markup. With --json also an object."""

    def work(as_json: JsonOption = False) -> None:
        raise error

    install_command(work)
    ended = flexvar("work")
    assert (ended.code, ended.out) == (code, "")
    got = error.got.replace("\n", " ")
    assert ended.err == f"error: {got} {error.fix}\n"
    ended = flexvar("work", "--json")
    assert ended.code == code and ended.err.startswith("error: [bold]this[/bold] ")
    kind = type(error).__name__
    assert ended.json == {"error": {"type": kind, "got": error.got, "expected": "[that]", "fix": error.fix}}


@pytest.mark.parametrize(
    ("got", "shown"),
    [
        ("steps is 0.", "--steps is 0."),
        ("guidance scale is nan.", "--cfg is nan."),
        ("The value of max_side is 'top_k'.", "The value of --max-side is 'top_k'."),
        ("/x/top_p.png and top_p differ.", "/x/top_p.png and --top-p differ."),
        ("The size has 3 steps.", "The size has 3 steps."),
        ("mask exists already.", "mask exists already."),
    ],
)
def test_errors_name_options(flexvar: Any, install_command: Any, got: str, shown: str) -> None:
    """In the place of Python arguments, but not in quotes and names of files. Here `mask` is such a name."""

    def work(file: str) -> None:
        raise InvalidInput(got, expected="a value", fix="Leave out sides, or pass the size.")

    install_command(work)
    fix = "Leave out --top, --right, --bottom or --left, or pass the size."
    assert flexvar("work", "mask").err == f"error: {shown} {fix}\n"


def test_an_option_without_its_value(flexvar: Any) -> None:
    """click does not say to which command this error belongs."""
    ended = flexvar("generate", "x", "-o", "y", "--seed")
    assert ended.code == 2 and ended.err.startswith("error: ") and "--seed" in ended.err


@pytest.mark.parametrize(
    ("error", "code", "kind", "text"),
    [
        (MemoryError(), 6, "OutOfMemory", "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 6, "OutOfMemory", "memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), 6, "OutOfMemory", "memory"),
        (OSError(28, "No space left on device"), 4, "EnvironmentFailed", "No space left on device"),
        (PermissionError(13, "Permission denied", "/x"), 4, "EnvironmentFailed", "Permission denied: '/x'"),
    ],
)
def test_errors_of_the_system(
    flexvar: Any, install_command: Any, error: Exception, code: int, kind: str, text: str
) -> None:
    def work(as_json: JsonOption = False) -> None:
        raise error

    install_command(work)
    ended = flexvar("work", "--json")
    assert ended.code == code and text in ended.err and "Traceback" not in ended.err
    assert ended.json["error"]["type"] == kind and text in ended.json["error"]["got"]


@pytest.mark.parametrize("error", [ValueError("one\ntwo"), AssertionError(), KeyError("name")])
def test_faults(flexvar: Any, install_command: Any, error: Exception) -> None:
    """They are no tracebacks, except with --verbose."""

    def work(as_json: JsonOption = False) -> None:
        raise error

    install_command(work)
    ended, line = flexvar("work", "--json"), work.__code__.co_firstlineno + 1
    assert ended.code == 1 and ended.err.count("\n") == 1 and "--verbose" in ended.err and "Traceback" not in ended.err
    assert ended.json["error"]["type"] == type(error).__name__
    assert f"{type(error).__name__} in test_main.py, line {line} (" in ended.json["error"]["got"]
    assert "Traceback" in flexvar("--verbose", "work").err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_interrupted(flexvar: Any, install_command: Any, error: BaseException) -> None:
    def work() -> None:
        raise error

    install_command(work)
    ended = flexvar("work")
    assert (ended.code, ended.out, ended.err) == (130, "", "interrupted\n")


def test_a_command_chooses_its_exit_code(flexvar: Any, install_command: Any) -> None:
    def work() -> None:
        raise typer.Exit(7)

    install_command(work)
    assert flexvar("work").code == 7


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nonsense"], "nonsense"),
        (["doctor", "--nonsense"], "--nonsense"),
        (["doctor", "extra"], "extra"),
        (["generate", "x", "-o", "y", "--seed", "1.5"], "--seed"),
        (["generate", "x", "-o", "y", "--batch-size", "0"], "--batch-size"),
        (["generate", "x"], "-o"),
        (["inspect"], "bundle"),
    ],
)
def test_usage(flexvar: Any, arguments: list[str], text: str) -> None:
    ended = flexvar(*arguments)
    assert (ended.code, ended.out) == (2, "") and text in ended.err
    ended = flexvar(*arguments, "--json")
    if arguments != ["nonsense"]:
        assert f"flexvar {arguments[0]} --help" in ended.json["error"]["fix"]
    assert ended.code == 2 and ended.json["error"]["type"] == "UsageError" and text in ended.json["error"]["got"]


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with steps(2, "work") as advance:
        advance("[first] " + "very " * 40 + "long")
        advance("second")
        advance("one more")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "work 1/2: [first] " + "very " * 40 + "long\nwork 2/2: second\nwork 3/3: one more\n"


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "err", Console(stderr=True, force_terminal=True, width=100))
    with steps(2, "work") as advance:
        advance("first")
        advance("second")
        advance("one more")
    captured = capsys.readouterr()
    assert captured.out == "" and "work: one more" in captured.err and "3/3" in captured.err


def test_verbose_shows_debugging_messages(flexvar: Any, install_command: Any) -> None:
    def work() -> None:
        log = logging.getLogger("flexvar_runtime.somewhere")
        log.debug("a detail")
        log.info("a [fact]")

    install_command(work)
    assert "a detail" not in flexvar("work").err
    ended = flexvar("--verbose", "work")
    assert ended.out == "" and "a detail" in ended.err and "a [fact]" in ended.err
