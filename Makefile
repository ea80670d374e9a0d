PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo/out
BENCH_OUT ?= build/bench
REHEARSAL_OUT ?= build/gpu-rehearsal
PYTEST_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := flexvar_ref:flexvar_ref flexvar_runtime:runtime flexvar_export:export flexvar_bench:benchmarks
# How mypy sees the packages: by import name, although the folders are called otherwise.
LINKS := .mypy_cache/packages

.DELETE_ON_ERROR:
.PHONY: help venv lint test test-slow test-engines demo bench gpu-rehearsal clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

venv: $(STAMP) ## the virtual environment, made anew when its requirements change

$(STAMP): pyproject.toml constraints.txt runtime/_version.py
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("got Python %d.%d; expected 3.11 or later; fix: make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "==> $(VENV): installing (minutes the first time: torch is large)"
	@"$(PYTHON)" -m venv "$(VENV)"
	@"$(BIN)/python" -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@"$(BIN)/python" -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[cpu,openvino,export,tensorrt-rtx,train,bench,dev]"
	@touch "$@"

lint: venv ## ruff, its formatter and mypy
	@echo "==> ruff"
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@echo "==> mypy"
	@mkdir -p $(LINKS)
	@for pair in $(PACKAGES); do ln -sfn "../../$${pair#*:}" "$(LINKS)/$${pair%%:*}"; done
	@"$(BIN)/mypy"

test: lint ## lint, then every test that is not marked slow or engines
	@echo "==> pytest"
	@OMP_NUM_THREADS=1 "$(BIN)/pytest" --quiet -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: venv ## the tests marked slow
	@"$(BIN)/pytest" --quiet -m slow $(PYTEST_ARGS) || [ $$? -eq 5 ]  # 5: there are none

test-engines: venv ## the tests marked engines: d16 for every published schedule, with TensorRT-RTX, no GPU needed
	@"$(BIN)/pytest" --quiet -m engines $(PYTEST_ARGS)

demo: venv ## the whole way with the demo model, into DEMO_OUT (demo/out)
	@"$(BIN)/python" demo/run.py --out "$(DEMO_OUT)"

bench: venv ## the models of benchmarks/standard.toml measured and drawn, into BENCH_OUT (build/bench); up to half an hour
	@mkdir -p "$(BENCH_OUT)"
	@"$(BIN)/flexvar" bench run --suite benchmarks/standard.toml -o "$(BENCH_OUT)/results.jsonl" --force
	@"$(BIN)/flexvar" bench report "$(BENCH_OUT)/results.jsonl" -o "$(BENCH_OUT)/page"

gpu-rehearsal: venv ## rehearse gpu_check.py on this CPU; results in REHEARSAL_OUT (build/gpu-rehearsal); takes about two minutes
	@OMP_NUM_THREADS=1 "$(BIN)/python" benchmarks/gpu_check.py --rehearse --out "$(REHEARSAL_OUT)"

clean: ## remove what was generated, except the virtual environment
	@rm -rf build dist demo/out flexvar_deploy.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find flexvar_ref runtime export benchmarks tests demo -type d -name __pycache__ -prune -exec rm -rf {} +
