"""`flexvar serve`: a bundle as an HTTP service."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from flexvar_runtime import Bundle, ScaleSchedule
from flexvar_runtime.backends import BACKENDS, CPU_BACKENDS, check_options, probe
from flexvar_runtime.checks import conflict, invalid
from flexvar_runtime.cli import options
from flexvar_runtime.cli.console import JsonOption, err, say
from flexvar_runtime.errors import EnvironmentFailed, InvalidInput
from flexvar_runtime.machine.processors import default_threads

from .settings import Layout, Limits, ModelSettings, ServiceSettings

_NEEDED = ("fastapi", "uvicorn", "httptools", "python_multipart", "prometheus_client")
_LOCAL = ("127.0.0.1", "::1", "localhost")
_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, as flexvar export writes it.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 takes requests from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in the API. The default is that of the directory.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=256,
            help="Worker processes on a CPU. 0 runs the model in a thread of the service. The default is measured.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each worker. The default is measured, or follows from --workers.")
    ] = None,
    backend: options.Backend = "auto",
    device: Annotated[
        str | None,
        typer.Option(help="GPUs joined by commas, such as cuda:0,cuda:1. Each has one worker. cpu uses the CPU."),
    ] = None,
    engines: options.Engines = None,
    allow_unproved: options.AllowUnproved = False,
    batch_sizes: Annotated[
        str, typer.Option(help="Numbers of images that may run in one batch, joined by commas. 1 must be one of them.")
    ] = "1,2,4,8",
    schedules: Annotated[
        str | None, typer.Option(help="Schedules that requests may use, joined by commas. The default is any.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest number of tokens of one image, summed over all scales. The default is 4 times the bundle's.",
        ),
    ] = None,
    queue: Annotated[
        int,
        typer.Option(
            min=1, help="Number of images that may wait. If the queue is full, further requests get status 429."
        ),
    ] = 64,
    max_connections: Annotated[int, typer.Option(min=1, help="Connections that may be open at once.")] = 2048,
    receive_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds within which a whole request must arrive.")
    ] = 30.0,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line. Without it, every client may generate.")
    ] = None,
    drain_delay: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds after SIGTERM in which new requests are still accepted. /health/ready is 503 meanwhile.",
        ),
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Serve a bundle over HTTP, with OpenAI's images API and a page to try it.

    The service runs until SIGTERM or Ctrl-C. It finishes the requests that it has accepted. The access log is one JSON
    line for each request, on standard error. With --json, the address is printed as one JSON line.
    """
    _require_packages()
    from .service import serve as run
    from .web.keys import read_keys
    from .web.server import listen, url
    from .web.state import Service

    model = ModelSettings(
        bundle=bundle,
        backend=backend,
        engines=check_options(backend, None, engines),
        allow_unproved=allow_unproved,
        batch_sizes=_batch_sizes(batch_sizes),
        schedules=_schedules(schedules),
    )
    given = _layout(workers, threads, device, backend)
    keys = () if api_keys is None else read_keys(api_keys)
    if host not in _LOCAL and not keys:
        say(
            "warning: everyone who reaches this machine can generate images. Pass --api-keys FILE to ask for a key.",
            err,
        )
    limits = Limits(queue=queue, max_tokens=max_tokens, connections=max_connections, receive_seconds=receive_timeout)
    with listen(host, port) as listener:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the service takes requests
        if not bundle.is_dir():
            Bundle.open(bundle)  # says why
        layout = _measured(model, device) if given is None else given
        say(f"opening {bundle} in {_how(layout)}", err)
        settings = ServiceSettings(
            model=model,
            layout=layout,
            limits=limits,
            name=name or _NAME.sub("-", bundle.resolve().name.removesuffix(".bundle")).strip("-") or "flexvar",
            keys=keys,
            drain_delay=drain_delay,
        )

        def on_ready(service: Service) -> None:
            pool, address = service.dispatcher.pool, url(listener)
            assert pool.facts is not None
            ready = {
                "url": address,
                "model": settings.name,
                "backend": pool.facts.backend,
                "workers": 0 if layout.in_thread else layout.workers,
                "threads": layout.threads,
                "pids": pool.pids,
            }
            say(f"{settings.name} on {pool.facts.backend}, {_how(layout)}. Press Ctrl-C to stop.", err)
            if as_json:
                sys.stdout.write(json.dumps(ready) + "\n")
            else:
                say(address)
            sys.stdout.flush()

        ended_by = asyncio.run(run(settings, listener, on_ready=on_ready))
    if ended_by == signal.SIGINT:
        raise KeyboardInterrupt


def _how(layout: Layout) -> str:
    return "a thread" if layout.in_thread else f"{layout.workers} worker{'s' * (layout.workers > 1)}"


def _require_packages() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        got = f"flexvar serve needs the packages of the extra serve ({missing[0]} is missing)."
        raise EnvironmentFailed(got, expected="the extra serve", fix="Run: pip install 'flexvar-deploy[serve]'")


def _layout(workers: int | None, threads: int | None, device: str | None, backend: str) -> Layout | None:
    """The layout that the options name; None if it is to be measured. Raises InvalidInput."""
    devices = None if device is None else [name.strip() for name in device.split(",")]
    for name in devices or ():
        check_options(backend, name, None)
    if devices is not None and devices != ["cpu"]:
        if workers is not None or threads is not None:
            raise conflict("--device", "--workers or --threads", "Leave them out: each device has one worker.")
        return Layout(devices=tuple(devices))
    if threads is not None and threads < 1:
        raise invalid(f"--threads is {threads}", "a whole number, 1 or more", "Pass the number of CPU threads.")
    one, processors = None if devices is None else "cpu", default_threads()
    on_gpu = devices is None and _runs_on_gpu(backend)
    if workers is None and threads is None:
        return Layout() if on_gpu else None
    if workers is None:
        return Layout(devices=(one,) * max(1, processors // (threads or 1)), threads=threads)
    if threads is None and not on_gpu:
        threads = max(1, processors // max(1, workers))
    return Layout(devices=(one,) * max(1, workers), threads=threads, in_thread=workers == 0)


def _runs_on_gpu(backend: str) -> bool:
    """Whether a backend runs on a GPU. "auto" is taken to do so if one of those works here."""
    if backend != "auto":
        return backend not in CPU_BACKENDS
    return any(probe(name).available for name in BACKENDS if name not in CPU_BACKENDS)


def _measured(model: ModelSettings, device: str | None) -> Layout:
    from .sizing import choose_layout

    say("measuring which number of workers is fastest (--workers and --threads skip this)", err)
    return choose_layout(model, device, lambda line: say(line, err))


def _batch_sizes(text: str) -> tuple[int, ...]:
    """ "1,2,4" as increasing numbers. Raises InvalidInput."""
    parts = [part.strip() for part in text.split(",")]
    sizes = sorted({int(part) for part in parts if part.isascii() and part.isdecimal() and len(part) < 5})
    if len(sizes) != len(parts) or not sizes or sizes[0] != 1 or sizes[-1] > 1024:
        got = f"--batch-sizes is {text[:100]!r}, but it must be different numbers from 1 to 1024, with 1 among them."
        raise InvalidInput(got, expected="numbers with 1", fix="Write them like 1,2,4,8.")
    return tuple(sizes)


def _schedules(text: str | None) -> tuple[ScaleSchedule, ...] | None:
    """ "1_2_4,1_4" as schedules. Raises InvalidInput."""
    try:
        return None if text is None else tuple(ScaleSchedule.parse(part.strip()) for part in text.split(","))
    except InvalidInput as error:
        got = error.got.replace("schedule", "A schedule of --schedules", 1)
        raise InvalidInput(
            got, expected=error.expected, fix="Join schedules by commas, such as 1_2_4_8_16,1_4_16."
        ) from None
