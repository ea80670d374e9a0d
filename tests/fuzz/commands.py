"""Random command lines. The commands and options are those of the application, so new ones are included."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

FAST = {("edit",), ("generate",), ("inspect",)}  # six times as frequent as the others
LONG = {("bench", "run"), ("export",)}  # a valid line takes some twenty seconds, so few are valid
ENDLESS = (
    "build",
    "run",
    "train",
    "serve",
    "load",
    "sample",
    "sweep",
)  # words of commands that are interrupted, because a valid line may take hours
SMALL = {"config": ("tokenizer.toml", "transformer.toml")}  # always given: without it, the published model is trained

PICTURES = ("photo.jpg", "clear.png", "made.png", "edited.png", "mask.png")
VALUES: dict[str, tuple[str, ...]] = {
    "against": ("run",),
    "after": ("results.jsonl",),
    "backend": ("auto", "ort-cpu", "openvino", "ort-openvino", "cuda", "ort-cuda", "tensorrt", "tensorrt-rtx"),
    "batch_size": ("1", "2", "3"),
    "batches": ("1",),
    "before": ("results.jsonl",),
    "bundle": ("tiny.bundle",),
    "bundles": ("tiny.bundle",),
    "checkpoint": ("transformer.pth",),
    "class_names": ("names.json",),
    "classes": ("0", "3,7", "0,1,2,3", "10", "9, 9"),
    "count": ("4", "8"),
    "data": ("photos", "scenes"),
    "deadline_ms": ("1000", "1e5"),
    "defaults": ("defaults.json",),
    "fit": ("resize", "crop", "pad"),
    "greedy_scales": ("none", "upstream", "1,2", "4x4"),
    "image": PICTURES,
    "images": ("run", "real.npz", "photos/class0"),
    "label": ("0", "3", "9", "10"),
    "mask": PICTURES,
    "network": ("tiny.onnx",),
    "output": ("out.png", "images", "out.jsonl", "out.bundle", "page"),
    "precision": ("fp32", "fp16", "bf16", "int8", "int8-bf16"),
    "quality": ("quality.json",),
    "reference": ("real.ref",),
    "requests": ("0", "1"),
    "results": ("results.jsonl",),
    "run": ("run",),
    "save_arrays": ("arrays.npz",),
    "schedule": ("1", "1_2_4", "1_2_3x5_4x6", "1_2_3_4_5_6", "1_2_3_4_5_6_8_10_13_16"),
    "seconds": ("1",),
    "size": ("16x16", "24x40", "64x64", "32x16"),
    "source": ("made.png", "edited.png"),
    "step_counts": ("4",),
    "suite": ("suite.toml",),
    "task": ("refine", "inpaint", "outpaint", "expand"),
    "threads": ("1", "2"),
    "tokenizer": ("vae.pth",),
    "top_p": ("0", "0.5", "0.95", "1"),
    "vae": ("vae.pth",),
    "variants": ("ort-cpu",),
}
"""Values that a command may accept, by the name of its argument. Others are derived from the type and the help text."""

NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "5",
    "-1",
    "0.5",
    "16",
    "1e-9",
    "1e9",
    "1e309",
    "nan",
    "-inf",
    "99999",
    "2" * 10,
    "9" * 30,
)
WILD = (
    *NUMBERS,
    *("", " ", "-", ".", "..", "/", "/dev/null", "/dev/full"),
    *("/proc/self/mem", "~", "*", "[/red]", "[bold]x", "%s", "\\", "\n"),
    *("None", "true", "auto", "none", "cuda:0", "cuda:9", "a,b"),
    *(",", "0,,1", "1_2", "1__2", "2_1", "1_2_0", "1_2_99999", "1x"),
    *("512px", "1_2_3x", "1" + "_2" * 3000, "0x0", "17x16", "999999x999999"),
    *("1x100000", "１２", "½", "é", "\u202e", "\udcff"),
    *("a" * 300, "b" * 5000, "new.png", "no/such/folder/x.png"),
    *("photo.jpg/x.png", "folder", "empty.txt", "noise.bin", "deep.json"),
    *("tiny.bundle", "tiny.bundle/manifest.json", "tiny.bundle/step.onnx"),
    *("tiny.bundle/tables.npz", "vae.pth", "transformer.pth"),
    *("made.png", "names.json", "suite.toml", "tokenizer.toml"),
    *("results.jsonl", "photos", "photos/class0/0.png", "--force", "-o"),
)


@cache
def all_commands() -> tuple[tuple[tuple[str, ...], tuple[Any, ...]], ...]:
    """(words, parameters) of every command of the application."""
    import typer

    from flexvar_runtime.cli.application import build

    def walk(command: Any, words: tuple[str, ...]) -> Any:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield words, tuple(command.params)
        for name in inner or ():
            yield from walk(inner[name], (*words, name))

    return tuple(walk(typer.main.get_command(build()), ()))


def command_line(seed: int) -> list[str]:
    """The arguments of `flexvar` of a seed."""
    rng = Random(seed)
    commands = all_commands()
    [(words, parameters)] = rng.choices(commands, [6 if words in FAST else 1 for words, _ in commands])
    if rng.random() < 0.02:
        words = rng.choice(((), words[:-1], (*words, rng.choice(WILD)), (rng.choice(WILD),)))
    careful = rng.random() < (0.003 if words in LONG else 0.6 if words in FAST else 0.1)
    valid = 0.99 if careful else 0.35 if words in LONG else 0.6
    share = rng.choice((0.0, 0.05, 0.15, 0.4))
    parts = []
    for parameter in parameters:
        if parameter.name in SMALL:
            parts.append([parameter.opts[0], rng.choice(SMALL[parameter.name])])
            continue
        wanted = rng.random() < (0.98 if parameter.required else 0.5 if parameter.multiple else share)
        if wanted or (careful and words == ("bench", "run") and parameter.name in VALUES):
            parts += [_words(parameter, careful, valid, rng) for _ in range(1 + (rng.random() < 0.03))]
    if rng.random() < 0.03:
        extra = ("--help", "--json", "--force", "--", "--verbose", "-x", "--no-such-option", "--seed=", *WILD)
        parts.append([rng.choice(extra)])
    if not careful:
        rng.shuffle(parts)
    first = [rng.choice(("--verbose", "--version", "--json"))] if rng.random() < 0.02 else []
    return [*first, *words, *(word for part in parts for word in part)]


def may_be_endless(arguments: list[str]) -> bool:
    """Whether a command line has to be interrupted after some seconds."""
    return any(word in ENDLESS for word in arguments)


def _words(parameter: Any, careful: bool, valid: float, rng: Random) -> list[str]:
    """An argument, or an option with its value."""
    value = _value(parameter, rng.random() < valid, rng)
    if parameter.param_type_name == "argument":
        return [value]
    name = rng.choice([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return [name]
    if not careful and rng.random() < 0.03:
        return [name]
    return [f"{name}={value}"] if name.startswith("--") and rng.random() < 0.2 else [name, value]


def _value(parameter: Any, valid: bool, rng: Random) -> str:
    if not valid:
        return rng.choice(WILD)
    if parameter.name in VALUES:
        return rng.choice(VALUES[parameter.name])
    kind = parameter.type_descriptor.annotation
    if kind is int:
        return str(rng.choice((0, 1, 2, 3, 5, 8)))
    if kind is float:
        return rng.choice(("0", "0.5", "1", "2.5"))
    if kind is Path:
        return rng.choice(("new", "folder", "new.png"))
    words: list[str] = re.findall(r"\w[\w.-]*\w", parameter.help or "")
    return rng.choice(words or WILD)
