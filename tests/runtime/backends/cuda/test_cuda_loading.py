"""cuBLASLt and cuDNN are found or refused with a reason, without torch, and have what the doubles pretend to have."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import fake_cudnn
import pytest
from device_numbers import make_device
from fake_cublaslt import VALUE_TYPES, FakeCublasLt

from flexvar_runtime.backends.cuda import loading
from flexvar_runtime.backends.cuda.loading import load_cublaslt, load_cudnn
from flexvar_runtime.cuda.libraries import NAMES, CudaLibrary, load_cuda_libraries
from flexvar_runtime.errors import BackendUnavailable

FIX = "Run: pip install 'flexvar-deploy[gpu]'"
Install = Callable[..., Any]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretend that both packages are installed, in these versions. An error in place of a version is raised.

    missing: the shared libraries that cuda.pathfinder does not find. Returns an object with the names of the shared
    libraries that were loaded, and with what `sys.modules` held in place of torch when cudnn was imported.
    """
    seen = types.SimpleNamespace(loaded=[], torch=[])
    real = importlib.import_module

    def pretend(nvmath: str | Exception = "1.0.0", cudnn: str | Exception = "1.24.1", *, missing: str = "") -> Any:
        def load(importer: Callable[[str], Any], names: tuple[str, ...]) -> tuple[CudaLibrary, ...]:
            seen.loaded.append(names)
            return tuple(CudaLibrary(n, None, "no such file") if n == missing else CudaLibrary(n, n) for n in names)

        def import_module(name: str, package: str | None = None) -> Any:
            if name.split(".")[0] not in ("nvmath", "cudnn"):
                return real(name, package)
            if name == "cudnn":
                seen.torch.append(sys.modules.get("torch", "absent"))
            version = cudnn if name == "cudnn" else nvmath
            if isinstance(version, Exception):
                raise version
            asked = types.SimpleNamespace(is_torch_available=lambda: seen.torch.append(sys.modules.get("torch")))
            return types.SimpleNamespace(__version__=version, __name__=name, datatypes=asked)

        monkeypatch.setattr(loading, "load_cuda_libraries", load)
        monkeypatch.setattr(importlib, "import_module", import_module)
        return seen

    return pretend


def test_the_modules_are_loaded_after_the_shared_libraries(install: Install) -> None:
    seen = install()
    assert load_cublaslt().__name__ == "nvmath.bindings.cublasLt"
    assert load_cudnn().__name__ == "cudnn"
    assert seen.loaded == [("cublasLt",), ("nvrtc", "cublasLt", "cublas", "cudart", "cudnn")]


@pytest.mark.parametrize("version", ["1.0.0", "1.0.0rc1", "1.9", "1.99.3"])
def test_versions_of_nvmath_that_work(install: Install, version: str) -> None:
    install(nvmath=version)
    load_cublaslt()


@pytest.mark.parametrize("version", ["0.9.0", "2.0", "2.0.1", "10.0"])
def test_versions_of_nvmath_that_do_not_work(install: Install, version: str) -> None:
    install(nvmath=version)
    with pytest.raises(BackendUnavailable, match=f"nvmath-python is version {version}, .* >=1.0,<2") as refusal:
        load_cublaslt()
    assert refusal.value.fix == FIX


@pytest.mark.parametrize("version", ["1.23.9", "1.25", "1.25.0", "0.24", "2.24.0"])
def test_versions_of_the_frontend_that_do_not_work(install: Install, version: str) -> None:
    install(cudnn=version)
    with pytest.raises(BackendUnavailable, match=f"cudnn-frontend is version {version}, .* >=1.24,<1.25") as refusal:
        load_cudnn()
    assert refusal.value.fix == FIX


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'x'"), OSError("bad ELF header.\nmore")])
def test_a_package_that_is_missing_or_damaged(install: Install, error: Exception) -> None:
    install(nvmath=error, cudnn=error)
    for load, package in ((load_cublaslt, "nvmath-python"), (load_cudnn, "nvidia-cudnn-frontend")):
        reason = re.escape(str(error).splitlines()[0].removesuffix("."))
        with pytest.raises(BackendUnavailable, match=rf"{package} cannot be imported \({reason}\)\.") as refusal:
            load()
        assert refusal.value.fix == FIX and refusal.value.__cause__ is error


def test_a_shared_library_that_is_missing(install: Install) -> None:
    install(missing="cudnn")
    load_cublaslt()
    with pytest.raises(BackendUnavailable, match=r"library of cuDNN cannot be loaded \(no such file\)") as refusal:
        load_cudnn()
    assert refusal.value.fix == FIX
    install(missing="cublas")
    load_cudnn()  # cuDNN may find the others by itself


@pytest.mark.parametrize("error", [None, ImportError("damaged")])
def test_torch_is_not_imported(install: Install, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """The blocked import is seen while cudnn is imported, and is gone afterwards, also after a failure."""
    seen = install(cudnn=error or "1.24.1")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    if error is None:
        load_cudnn()
    else:
        with pytest.raises(BackendUnavailable):
            load_cudnn()
    assert seen.torch == [None] * (1 if error else 2)
    assert "torch" not in sys.modules


@pytest.mark.parametrize("module", [types.ModuleType("torch"), None])
def test_a_torch_that_is_imported_or_blocked_stays(
    install: Install, monkeypatch: pytest.MonkeyPatch, module: types.ModuleType | None
) -> None:
    seen = install()
    monkeypatch.setitem(sys.modules, "torch", module)  # type: ignore[arg-type]
    load_cudnn()
    assert seen.torch[0] is module and sys.modules["torch"] is module


def test_other_libraries_can_be_named() -> None:
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        return types.SimpleNamespace(abs_path=f"/{name}")

    pathfinder = types.SimpleNamespace(load_nvidia_dynamic_lib=load)
    assert load_cuda_libraries(lambda _: pathfinder, ("nvrtc", "cudnn")) == (
        CudaLibrary("nvrtc", "/nvrtc"),
        CudaLibrary("cudnn", "/cudnn"),
    )
    assert asked == ["nvrtc", "cudnn"]
    load_cuda_libraries(lambda _: pathfinder)
    assert asked[2:] == list(NAMES)


def test_the_real_pathfinder_knows_every_name() -> None:
    pytest.importorskip("cuda.pathfinder")
    problems = [library.problem or "" for library in load_cuda_libraries(names=loading._CUDNN_NAMES)]
    assert not any("Unknown library name" in problem for problem in problems)


# the real libraries, which need no GPU to be imported ----------------------------------------------------------------


def parameters(function: Any) -> list[str]:
    names = inspect.signature(function).parameters
    return [name for name in names if name != "self"]


def test_cublaslt_has_what_the_double_pretends_to_have() -> None:
    """The code under test uses no other names, because the double has no others."""
    real = pytest.importorskip("nvmath.bindings.cublasLt", reason="needs nvmath-python, no GPU")
    assert (1, 0) <= tuple(map(int, importlib.import_module("nvmath").__version__.split(".")[:2])) < (2, 0)
    fake = FakeCublasLt(make_device())
    functions = [n for n, f in inspect.getmembers(fake, inspect.ismethod) if not n.startswith("_")]
    assert {"create", "matmul", "matmul_algo_get_heuristic"} < set(functions)
    for name in functions:
        assert parameters(getattr(real, name)) == parameters(getattr(fake, name)), name
    for name in (
        "MatmulDescAttribute",
        "MatrixLayoutAttribute",
        "MatmulPreferenceAttribute",
        "Epilogue",
        "ReductionScheme",
    ):
        for member in getattr(fake, name):
            assert int(getattr(real, name)[member.name]) == member, member
    assert real.matmul_heuristic_result_dtype == fake.matmul_heuristic_result_dtype
    types_of = {
        "MatmulDescAttribute": "get_matmul_desc_attribute_dtype",
        "MatrixLayoutAttribute": "get_matrix_layout_attribute_dtype",
        "MatmulPreferenceAttribute": "get_matmul_preference_attribute_dtype",
    }
    for name, function in types_of.items():
        for member in getattr(fake, name):
            assert getattr(real, function)(getattr(real, name)[member.name]) is VALUE_TYPES[member.name]
    constants = importlib.import_module("nvmath.bindings.cublas").ComputeType
    kinds = importlib.import_module("nvmath").CudaDataType
    assert int(constants.COMPUTE_32F) == 68
    assert [int(kinds[f"CUDA_R_{name}"]) for name in ("32F", "16F", "16BF")] == [0, 2, 14]


def test_cudnn_has_what_the_double_pretends_to_have() -> None:
    if importlib.util.find_spec("cudnn") is None:
        pytest.skip("needs nvidia-cudnn-frontend, no GPU")
    before = "torch" in sys.modules
    real = loading.import_cudnn()
    assert ("torch" in sys.modules) is before and real.datatypes.is_torch_available() is before
    assert real.__version__.startswith("1.24.")
    for name in ("data_type", "heur_mode", "build_plan_policy"):
        for member in getattr(fake_cudnn.FakeCudnn, name):
            assert member.name in getattr(real, name).__members__, member
    assert issubclass(real.cudnnGraphNotSupportedError, Exception)
    for name in ("create_handle", "set_stream", "destroy_handle"):
        assert named(getattr(real, name)) == [parameters(getattr(fake_cudnn.FakeCudnn, name))], name
    for kind, fake in ((real.pygraph, fake_cudnn.Pygraph), (real.tensor, fake_cudnn.Tensor)):
        methods = [n for n, f in inspect.getmembers(fake, inspect.isfunction) if not n.startswith("_")]
        methods = [name for name in methods if name != "numbers"]
        assert len(methods) > 4
        for name in methods:
            wanted = set(parameters(getattr(fake, name)))
            known = named(getattr(kind, name))
            assert wanted <= {parameter for names in known for parameter in names}, (name, known)
    overloads = [set(names) for names in named(real.pygraph.conv_fprop)]
    for padding in ({"padding"}, {"pre_padding", "post_padding"}):
        assert any({"image", "weight", "stride", "dilation", *padding} <= names for names in overloads)
    graph = set(parameters(fake_cudnn.Pygraph.__init__)) - {"library"}
    assert graph <= set(named(real.pygraph.__init__)[0])


def named(function: Any) -> list[list[str]]:
    """The names of the parameters of every overload of a compiled function, from its documentation."""
    if inspect.isfunction(function):
        return [parameters(function)]
    lines = [line for line in (function.__doc__ or "").splitlines() if re.match(r"(\d+\. )?\w+\(.*\) -> ", line)]
    return [[name for name in re.findall(r"[(,] ?(\w+): ", line) if name != "self"] for line in lines]
