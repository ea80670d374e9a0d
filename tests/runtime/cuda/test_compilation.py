"""Compiled kernels are kept for this user, under all that they depend on, and a damaged file is never loaded."""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from flexvar_runtime.cuda import compilation
from flexvar_runtime.cuda.compilation import compile_kernels
from flexvar_runtime.errors import BackendUnavailable

CUBIN = b"\x7fELF and more"


@dataclass(frozen=True)
class Kernels:
    """A kernel set of a test."""

    source: str = "source"
    fuses: bool = True
    size: int = 1
    names: tuple[str, ...] = ("one",)

    def defines(self) -> dict[str, int]:
        return {"SIZE": self.size}


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The targets that were compiled, with an empty cache."""
    asked: list[str] = []

    def compile_source(source: str, target: str, kernels: Kernels) -> tuple[bytes, str]:
        asked.append(target)
        if source == "wrong":
            raise BackendUnavailable("it does not compile", expected="a source", fix="mend it")
        return CUBIN + source.encode(), ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compilation, "compile_source", compile_source)
    monkeypatch.setattr(compilation, "_versions", lambda: ("1.2.2", "13.5"))
    monkeypatch.setattr(logging.getLogger("flexvar_runtime"), "propagate", True)
    return asked


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "flexvar" / "kernels").glob("*"))


def test_only_the_first_call_compiles(compiler: list[str], tmp_path: Path) -> None:
    first = compile_kernels("sm_90", Kernels())
    assert compile_kernels("sm_90", Kernels()) == first == CUBIN + b"source" and compiler == ["sm_90"]
    [file] = kept(tmp_path)
    assert file.suffix == ".cubin" and stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_whatever_the_result_depends_on_compiles_again(
    compiler: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_kernels("sm_90", Kernels())
    for changed in (replace(Kernels(), source="other"), replace(Kernels(), fuses=False), replace(Kernels(), size=2)):
        compile_kernels("sm_90", changed)
    compile_kernels("sm_80", Kernels())
    monkeypatch.setattr(compilation, "_versions", lambda: ("another",))
    compile_kernels("sm_90", Kernels())
    assert len(compiler) == len(kept(tmp_path)) == 6


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "text"])
def test_a_damaged_file_is_replaced(
    damage: str, compiler: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compile_kernels("sm_90", Kernels())
    [file] = kept(tmp_path)
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-1], "changed": data[:-1] + b"!", "empty": b"", "text": b"text" * 20}[damage])
    assert compile_kernels("sm_90", Kernels()) == CUBIN + b"source" and len(compiler) == 2
    assert "damaged" in caplog.text and file.read_bytes() == data


def test_a_file_that_others_can_write_is_not_trusted(
    compiler: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compile_kernels("sm_90", Kernels())
    [file] = kept(tmp_path)
    file.chmod(0o666)
    assert compile_kernels("sm_90", Kernels()) == CUBIN + b"source"
    assert len(compiler) == 2 and "cannot be kept" in caplog.text


def test_without_a_cache_it_still_compiles(
    compiler: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    assert compile_kernels("sm_90", Kernels()) == CUBIN + b"source"
    assert "compiled again each time" in caplog.text


def test_a_link_in_the_cache_is_not_followed(compiler: list[str], tmp_path: Path) -> None:
    compile_kernels("sm_90", Kernels())
    [file] = kept(tmp_path)
    data = file.read_bytes()
    file.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", file)
    assert compile_kernels("sm_90", Kernels()) == CUBIN + b"source" and len(compiler) == 2
    assert (tmp_path / "elsewhere").read_bytes() == data


def test_a_source_that_does_not_compile_leaves_nothing(compiler: list[str], tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="does not compile"):
        compile_kernels("sm_90", Kernels("wrong"))
    assert kept(tmp_path) == []
