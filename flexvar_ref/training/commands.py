"""`flexvar train tokenizer` and `flexvar train transformer`. Heavy imports wait until a command runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from ..errors import FlexVARRefError, MissingExtra

if TYPE_CHECKING:
    from .config import TokenizerRun, TransformerRun
    from .runs import Result, RunOptions

R = TypeVar("R", "TokenizerRun", "TransformerRun")

err = Console(stderr=True, markup=False, emoji=False, highlight=False)  # file names are printed as they are
DataOption = Annotated[
    str, typer.Option(help="Directory with one directory of images for each class, or scenes for the built-in images.")
]
OutOption = Annotated[Path, typer.Option(help="Directory to write checkpoints and logs to.")]
ConfigOption = Annotated[
    Path | None, typer.Option(help="Configuration file, TOML or JSON. The default is the published model.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
StepsOption = Annotated[int | None, typer.Option(help="Number of training steps. The default is in the configuration.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=1024, help="Number of CPU threads.")]
CacheOption = Annotated[
    Path | None, typer.Option(help="Directory for prepared samples. The default is cache in --out.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def register(app: typer.Typer) -> None:
    train = typer.Typer(help="Train a tokenizer, then a transformer on its tokens.", no_args_is_help=True)
    train.command()(tokenizer)
    train.command()(transformer)
    app.add_typer(train, name="train")


def tokenizer(
    data: DataOption,
    out: OutOption,
    config: ConfigOption = None,
    resume: ResumeOption = False,
    steps: StepsOption = None,
    threads: ThreadsOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a tokenizer that turns images into tokens."""
    with _report_errors(as_json):
        _require_extra()
        from .config import TokenizerRun
        from .runs import train_tokenizer

        run = _load_run(config, TokenizerRun, steps)
        _print_result(train_tokenizer(run, data, _run_options(out, cache, resume, threads)), as_json)


def transformer(
    data: DataOption,
    out: OutOption,
    tokenizer: Annotated[
        Path, typer.Option(help="Trained tokenizer: .safetensors with its .json beside it, or FlexVAE.pth.")
    ],
    weights: Annotated[
        str | None,
        typer.Option(help="Weights to take from a tokenizer file that holds both: ema (averaged) or model."),
    ] = None,
    config: ConfigOption = None,
    resume: ResumeOption = False,
    steps: StepsOption = None,
    threads: ThreadsOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a transformer on the tokens of a trained tokenizer."""
    with _report_errors(as_json):
        _require_extra()
        from .config import TransformerRun
        from .runs import train_transformer

        run = _load_run(config, TransformerRun, steps)
        _print_result(
            train_transformer(run, data, tokenizer, _run_options(out, cache, resume, threads), weights), as_json
        )


def _require_extra() -> None:
    try:
        import accelerate  # noqa: F401
        import safetensors  # noqa: F401
        import tensorboard  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"Training needs the module {error.name}, which is not installed.",
            expected="the train extra",
            fix="Install it with: pip install 'flexvar-deploy[train]'",
        ) from error


def _load_run(path: Path | None, kind: type[R], steps: int | None) -> R:
    from .config import load_config

    run = kind() if path is None else load_config(path, kind)
    return run if steps is None else dataclasses.replace(run, loop=dataclasses.replace(run.loop, steps=steps))


def _run_options(out: Path, cache: Path | None, resume: bool, threads: int | None) -> RunOptions:
    import torch

    from .runs import RunOptions

    if threads is not None:
        torch.set_num_threads(threads)
    return RunOptions(out=out, cache=cache, resume=resume, progress=_progress_printer())


def _progress_printer() -> Callable[[str, int, int], None]:
    """A function that prints one line for each tenth of the samples that are prepared."""
    printed: dict[str, int] = {}

    def print_progress(what: str, done: int, count: int) -> None:
        tenth = 10 * done // count
        if printed.get(what) != tenth:
            printed[what] = tenth
            err.print(f"preparing {what}: {done}/{count}")

    return print_progress


def _print_result(result: Result, as_json: bool) -> None:
    """End the process group, and print the result if this is the main process."""
    from accelerate import PartialState

    from .runs import as_json as plain

    main = PartialState().is_main_process
    PartialState().destroy_process_group()
    if not main:
        return
    if as_json:
        sys.stdout.write(json.dumps(plain(result), indent=1) + "\n")
        return
    measures = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items() if "/" not in name)
    typer.echo(f"{result.path}: {result.steps} steps, {measures}")


@contextmanager
def _report_errors(as_json: bool) -> Iterator[None]:
    """Print an error of this package on standard error, with --json also as JSON, and exit with its exit code."""
    try:
        yield
    except FlexVARRefError as error:
        if as_json:
            content = {"type": type(error).__name__, "got": error.got, "expected": error.expected, "fix": error.fix}
            sys.stdout.write(json.dumps({"error": content}, indent=1) + "\n")
        err.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
