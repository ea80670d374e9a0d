"""`flexvar train tokenizer` and `flexvar train transformer`. Heavy imports wait until a command runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from .errors import MissingExtra

if TYPE_CHECKING:
    from .config import TokenizerRun, TransformerRun
    from .runs import Place, Result

R = TypeVar("R", "TokenizerRun", "TransformerRun")
REFUSED = 5  # exit code for a file that is not what it claims to be

err = Console(stderr=True)
DataOption = Annotated[str, typer.Option(help="Folder of images, one folder a class, or: scenes.")]
OutOption = Annotated[Path, typer.Option(help="Folder of the run.")]
ConfigOption = Annotated[Path | None, typer.Option(help="Configuration, TOML or JSON.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")]
StepsOption = Annotated[int | None, typer.Option(help="Steps, instead of the configuration's.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Processor threads.")]
CacheOption = Annotated[Path | None, typer.Option(help="Where prepared samples are kept, if not in --out.")]
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
    """Train the tokenizer: images to tokens at every scale, and back."""
    with _refusals(as_json):
        _require_extra()
        from .config import TokenizerRun
        from .runs import train_tokenizer

        run = _configured(config, TokenizerRun, steps)
        _finish(train_tokenizer(run, data, _place(out, cache, resume, threads)), as_json)


def transformer(
    data: DataOption,
    out: OutOption,
    tokenizer: Annotated[Path, typer.Option(help="Trained tokenizer: .safetensors with its .json, or FlexVAE.pth.")],
    config: ConfigOption = None,
    resume: ResumeOption = False,
    steps: StepsOption = None,
    threads: ThreadsOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the transformer on the tokens of a trained tokenizer."""
    with _refusals(as_json):
        _require_extra()
        from .config import TransformerRun
        from .runs import train_transformer

        run = _configured(config, TransformerRun, steps)
        _finish(train_transformer(run, data, tokenizer, _place(out, cache, resume, threads)), as_json)


def _require_extra() -> None:
    try:
        import accelerate  # noqa: F401
        import safetensors  # noqa: F401
        import tensorboard  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"no module {error.name}", expected="the train extra", fix="pip install 'flexvar-deploy[train]'"
        ) from error


def _configured(path: Path | None, kind: type[R], steps: int | None) -> R:
    from .config import load_config

    run = kind() if path is None else load_config(path, kind)
    return run if steps is None else dataclasses.replace(run, loop=dataclasses.replace(run.loop, steps=steps))


def _place(out: Path, cache: Path | None, resume: bool, threads: int | None) -> Place:
    import torch

    from .runs import Place

    if threads is not None:
        torch.set_num_threads(threads)
    return Place(out=out, cache=cache, resume=resume, progress=_preparing())


def _preparing() -> Callable[[str, int, int], None]:
    """A line at every tenth of what is prepared."""
    told: dict[str, int] = {}

    def tell(what: str, done: int, count: int) -> None:
        tenth = 10 * done // count
        if told.get(what) != tenth:
            told[what] = tenth
            err.print(f"preparing {what}: {done}/{count}", highlight=False, markup=False)

    return tell


def _finish(result: Result, as_json: bool) -> None:
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
def _refusals(as_json: bool) -> Iterator[None]:
    """A typed refusal as text for people, as JSON where that was asked for, and as the exit code."""
    try:
        yield
    except ValueError as error:
        parts: dict[str, Any] = {name: getattr(error, name, None) for name in ("got", "expected", "fix")}
        if not all(isinstance(part, str) for part in parts.values()):
            raise
        if as_json:
            content = {"error": {"type": type(error).__name__, **parts}}
            sys.stdout.write(json.dumps(content, indent=1) + "\n")
        for label, name in (("error: got", "got"), ("  expected", "expected"), ("  fix", "fix")):
            err.print(f"{label}: {parts[name]}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(getattr(error, "exit_code", REFUSED)) from error
