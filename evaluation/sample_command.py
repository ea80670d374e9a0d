"""`flexvar evaluate sample`: thousands of images of one bundle, or their features."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from flexvar_runtime import FlexVARPipeline, ScaleSchedule
from flexvar_runtime.backends import CPU_BACKENDS
from flexvar_runtime.cli import options
from flexvar_runtime.cli.console import JsonOption, emit, err, say
from flexvar_runtime.cuda.gpu import find_gpus
from flexvar_runtime.errors import FlexVARError, InvalidInput
from flexvar_runtime.files.targets import check_files, make_writable
from flexvar_runtime.model.presets import preset

from .runs.claims import claimed
from .runs.parts import Share, parse_share, share_of_launcher
from .runs.pixels_npz import write_pixels_npz
from .runs.sampling import Sampled, images_done, require_space, shard_folder
from .runs.sampling import sample as make_shards
from .runs.settings import PIXELS, PUBLISHED_COUNT, RunSettings, begin_or_resume, is_run, read_settings
from .runs.starting import (
    MOST_IMAGES,
    SHARD_SIZE,
    BatchSize,
    NetworkOnSameDevice,
    Seed,
    describe_run,
    duration,
    open_network,
    reporting,
)

Network = Annotated[
    Path | None,
    typer.Option(help="Feature network of flexvar evaluate import. With it the run keeps features, without it pixels."),
]


def sample(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, as flexvar export writes it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the run. An unfinished run continues.")],
    network: Network = None,
    count: Annotated[
        int | None, typer.Option(min=1, max=MOST_IMAGES, help="Number of images. With --preset, the default is 50000.")
    ] = None,
    preset_name: options.PresetName = None,
    schedule: options.Schedule = None,
    cfg: options.Cfg = None,
    guidance: options.GuidanceRule = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    greedy_scales: options.Greedy = None,
    max_side: options.MaxSide = None,
    seed: Seed = 0,
    backend: options.Backend = "auto",
    device: options.Device = None,
    engines: options.Engines = None,
    threads: options.Threads = None,
    network_backend: NetworkOnSameDevice = None,
    allow_unproved: options.AllowUnproved = False,
    batch_size: BatchSize = None,
    shard_size: Annotated[
        int,
        typer.Option(min=1, max=4096, help="Number of images in a file. A killed process loses at most one file."),
    ] = SHARD_SIZE,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Make only every n-th file from file i on: i/n, such as 0/8. The default is that of torchrun or SLURM."
        ),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Also write a PNG file of each image into OUTPUT/images.")] = False,
    npz: Annotated[
        Path | None, typer.Option(help="NPZ file of all pixels for OpenAI's evaluator, written when all images exist.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --npz.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Generate images and keep their features.

    Image i has class i mod the number of classes. Its random numbers depend on the seed and i alone. Run the same
    command again to continue. Several processes may work on one directory at once. --preset or --count must be given.
    """
    if count is None and preset_name is None:
        got = "Neither --preset nor --count is given."
        raise InvalidInput(
            got, expected="a number of images", fix="Pass --count, or --preset for its settings and 50,000 images."
        )
    share = share_of_launcher(os.environ) if shard is None else parse_share(shard)
    if share.source not in ("", "--shard"):
        say(f"this process makes share {share}, as {share.source} says (--shard 0/1 makes all)", err)
    if npz is not None:
        check_files([npz], force)
        make_writable(npz.absolute().parent)
    make_writable(output)
    published = None if preset_name is None else preset(preset_name)
    with ExitStack() as stack:
        device = _device(device, backend, share)
        pipe = stack.enter_context(
            FlexVARPipeline.from_bundle(bundle, backend, device, threads, engines, allow_unproved=allow_unproved)
        )
        start = options.starting_settings(pipe, None, "generate", published)
        if schedule is not None:
            start = replace(start, schedule=ScaleSchedule.parse(schedule))
        first = options.with_options(start, cfg, guidance, top_k, top_p, greedy_scales, max_side, seed, 0)
        extractor = None
        if network is not None:
            extractor = stack.enter_context(open_network(network, pipe, network_backend, device, threads))
        settings, batch = describe_run(
            pipe,
            first,
            PUBLISHED_COUNT if count is None else count,
            extractor,
            shard_size=shard_size,
            batch_size=batch_size,
            pixels=npz is not None,
            png=png,
        )
        _require_space(output, settings, npz)
        begin_or_resume(output, settings)
        with reporting(settings, share) as report:
            result = make_shards(pipe, output, settings, batch, share, extractor, report)
    written = npz is not None and result.complete and _write_npz(npz, output, settings, force)
    _report(output, settings, share, result, npz if written else None, as_json)


def _require_space(output: Path, settings: RunSettings, npz: Path | None) -> None:
    """Raise EnvironmentFailed if there is too little space for what is missing of the run, and for the NPZ file."""
    extra = 0 if npz is None else settings.count * settings.bytes_of_pixels
    resumed = is_run(output) and read_settings(output).digest == settings.digest
    done = images_done(shard_folder(output, settings)) if resumed else 0
    if npz is None or output.stat().st_dev == npz.absolute().parent.stat().st_dev:
        require_space(output, settings, done, extra)
    else:
        require_space(output, settings, done)
        require_space(npz.absolute().parent, settings, settings.count, extra)


def _write_npz(npz: Path, output: Path, settings: RunSettings, force: bool) -> bool:
    """Write the pixels of a complete run, unless another process does. Returns whether this process has."""
    shards, (height, width) = shard_folder(output, settings), settings.size
    with claimed(npz.with_name(f".{npz.name}.claim")) as claim:
        if claim is None or (npz.exists() and not force):
            return False
        blocks = (shards.read(shard, (PIXELS,))[PIXELS] for shard in shards.require_complete(partial=False))
        write_pixels_npz(npz, blocks, (settings.count, height, width, 3), force=force)
    return True


def _device(device: str | None, backend: str, share: Share) -> str | None:
    """The GPU of this process: the one that is named, or that of its number if a launcher started one for each."""
    if device is not None or share.local is None or backend in CPU_BACKENDS:
        return device
    try:
        gpus = len(find_gpus())
    except FlexVARError:
        return None
    return f"cuda:{share.local % gpus}" if gpus > 1 else None


def _report(
    output: Path, settings: RunSettings, share: Share, result: Sampled, npz: Path | None, as_json: bool
) -> None:
    rate = result.made / result.seconds if result.made else None
    hours = None if rate is None else PUBLISHED_COUNT / rate / 3600
    data = {
        "run": str(output),
        "images": result.done,
        "count": result.count,
        "complete": result.complete,
        "made": result.made,
        "share": str(share),
        "seconds": result.seconds,
        "images_per_second": rate,
        "hours_for_50000": hours,
        "npz": None if npz is None else str(npz),
        "settings": settings.to_json(),
    }

    def show() -> None:
        say(f"{output}: {result.done:,} of {result.count:,} images")
        if rate is not None and hours is not None:
            say(
                f"{result.made:,} made by this process in {result.seconds:.1f} s, {rate:.3g} images/s; "
                f"50,000 would take {duration(3600 * hours)}"
            )
        if npz is not None:
            say(str(npz))
        if not result.complete and share.count > 1:
            say(f"Share {share} is done. Run the other shares too, or pass --shard 0/1 to make everything.")
        elif not result.complete:
            say("Other processes are making the other images. If none is running, run this command again.")

    emit(data, as_json, show)
