"""What `make demo` runs: export the demo model to a bundle, verify it, generate images and draw a contact sheet.

It calls the `flexvar` command beside this Python interpreter, as a user would. The extras `cpu` and `export` suffice.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).parent / "model"
ALL, SOME = tuple(range(12)), (0, 1, 2, 4, 9, 11)
SHEET = {  # schedule and classes of each row; the model was trained at 16x16 tokens (64 pixels)
    "6 steps": ("1_2_4_6_10_16", ALL),
    "8 steps": ("1_2_3_5_7_10_13_16", ALL),
    "10 steps": ("1_2_3_4_5_6_8_10_13_16", ALL),
    "3:2": ("1_2x3_3x4_4x6_5x8_6x9_8x12_11x16_16x24", (*SOME, 3, 6)),
    "twice the size": ("1_2_3_4_5_6_8_10_13_16_23_32", SOME),
}
BACKENDS = ("ort-cpu",)
SEED = 2026
GAP, LABEL = 6, 16  # pixels between pictures, height of a caption

console = Console()


def flexvar(*arguments: str | Path) -> dict[str, Any]:
    """Print a `flexvar` command, run it and return its JSON result. If it fails, the demo ends with its exit code."""
    command = ["flexvar", *map(str, arguments)]
    console.print(f"$ {shlex.join(command)}", style="bold", highlight=False, markup=False, soft_wrap=True)
    here = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def contact_sheet(rows: dict[str, list[Path]], path: Path) -> None:
    """Write one picture: a row for each schedule, a column for each class."""
    pictures = {name: [Image.open(file) for file in files] for name, files in rows.items()}
    width = max(sum(p.width + GAP for p in row) for row in pictures.values()) + GAP
    height = sum(row[0].height + LABEL + GAP for row in pictures.values()) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = GAP
    for name, row in pictures.items():
        draw.text((GAP, y), name, fill="black")
        y += LABEL
        x = GAP
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width + GAP
        y += row[0].height + GAP
    sheet.save(path)


def show_parity(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("graph", "scale", "output", "metric", "value", "bound", title=title)
    for row in rows:
        value, bound = f"{row['value']:.3g}", f"{row['bound']:g}"
        table.add_row(row["graph"], row["scale"] or "", row["output"], row["metric"], value, bound)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    bundle = out / "demo.bundle"
    weights = MODEL / "transformer.safetensors", "--vae", MODEL / "vae.safetensors"
    names = "--class-names", MODEL / "classes.json"
    settings = "--defaults", MODEL / "defaults.json", "--quality", MODEL / "quality.json"
    flexvar("export", *weights, *names, *settings, "-o", bundle, "--force")
    verified = flexvar("verify", bundle)
    show_parity(verified["parity"]["rows"], f"parity with the reference on {verified['parity']['backend']}")

    sheet: dict[str, list[Path]] = {}
    columns = "schedule", "backend", "s per image", "decoder, s", "sampling, s"
    times = Table(*columns, title="one image at a time, without the first")
    for backend in BACKENDS:
        for name, (schedule, labels) in SHEET.items():
            target = out / "images" / name.replace(" ", "_").replace(":", "_")
            options = (
                "--schedule",
                schedule,
                "--seed",
                str(SEED),
                "--backend",
                backend,
                "--batch-size",
                "1",
                "--force",
            )
            classes = ",".join(map(str, labels))
            result = flexvar("generate", bundle, "--classes", classes, *options, "-o", target)
            sheet[name] = [Path(image["file"]) for image in result["images"]]
            warm = result["timings"][1:]  # the first image opens the graphs
            mean = {key: sum(t[key] for t in warm) / len(warm) for key in ("total", "decode", "sampling")}
            times.add_row(name, backend, *(f"{mean[key]:.3f}" for key in ("total", "decode", "sampling")))
    contact_sheet(sheet, out / "contact_sheet.png")
    (out / "parity.json").write_text(json.dumps(verified, indent=1) + "\n")
    console.print(times)
    for what, where in (
        ("contact sheet", out / "contact_sheet.png"),
        ("images", out / "images"),
        ("parity", out / "parity.json"),
        ("bundle", bundle),
    ):
        console.print(f"{what}: {where}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
