"""Exports the bundles of the demo model that its evaluation needs, and keeps them in a work folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

import flexvar_export
import flexvar_ref
from flexvar_export.bundle import export_bundle
from flexvar_export.bundle_writer import write_bundle
from flexvar_export.emulate import emulate_bf16
from flexvar_ref.training import scenes
from flexvar_runtime import Bundle


def checkpoint_of(model: Path) -> tuple[Path, Path]:
    """The files of transformer and tokenizer."""
    return model / "transformer.safetensors", model / "vae.safetensors"


def digests(model: Path) -> dict[str, str]:
    """The sha256 of each weight file, by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint_of(model)}


def exported(model: Path, work: Path, precision: str) -> Path:
    """The bundle of the model in `work`. Its name holds a hash of the weights and of the exporting code."""
    transformer, tokenizer = checkpoint_of(model)
    sources = sorted(Path(flexvar_export.__file__).parent.glob("*.py"))
    tells = [*digests(model).values(), *(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)]
    key = hashlib.sha256("".join(tells).encode()).hexdigest()[:12]
    out = work / f"{key}-{precision}.bundle"
    if not out.exists():
        export_bundle(transformer, tokenizer, out, precision=precision, class_names=scenes.CLASSES)
    if precision.endswith("bf16"):  # not every CPU has such kernels, so float32 graphs round as bfloat16 does
        emulated = work / f"{key}-{precision}-emulated.bundle"
        if not emulated.exists():
            with write_bundle(emulated) as directory:
                emulate_bf16(Bundle.open(out), directory)
        return emulated
    return out


def untrained(model: Path, work: Path) -> Path:
    """A bundle of the same sizes whose transformer was never trained, with the trained tokenizer."""
    control = work / "untrained"
    control.mkdir(exist_ok=True)
    transformer, tokenizer = flexvar_ref.load(*checkpoint_of(model))
    torch.manual_seed(0)
    first, second = checkpoint_of(control)
    flexvar_ref.save(flexvar_ref.FlexVAR(transformer.config, tokenizer.codebook_VD), first)
    flexvar_ref.save(tokenizer, second)
    return exported(control, work, "fp32")
