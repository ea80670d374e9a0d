PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
LOWEST_VENV ?= .venv-lowest
LOWEST_OUT ?= build/lowest
DEMO_OUT ?= demo/out
BENCH_OUT ?= build/bench
REHEARSAL_OUT ?= build/gpu-rehearsal
PYTEST_ARGS ?=
# Cases of `make fuzz`, by kind. They have the seeds from FUZZ_FIRST on.
export FUZZ_FIRST ?= 0
export FUZZ_ONE_PROCESS ?= 10000
export FUZZ_INSTALLED ?= 300
export FUZZ_CALLS ?= 10000
export FUZZ_PICTURES ?= 2000
export FUZZ_BUNDLES ?= 2000
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := cpu,openvino,export,tensorrt-rtx,train,bench,serve,evaluate,dev
VENV_HOLDS := flexvar-deploy and everything that its tests need (torch is large: this takes minutes)
DEMO_STAMP := $(DEMO_VENV)/.installed
DEMO_EXTRAS := cpu,export
DEMO_HOLDS := flexvar-deploy[$(DEMO_EXTRAS)]: ONNX Runtime to generate, torch and onnx to export (1.2 GB with torch for CPUs, more with CUDA; this takes minutes)
SERVING_STAMP := $(VENV)/.installed-serving
SERVING_HOLDS := openai, playwright and schemathesis, for the tests of the service
LOWEST_STAMP := $(LOWEST_VENV)/.installed
LOWEST_EXTRAS := cpu
REQUIREMENTS := pyproject.toml constraints.txt runtime/_version.py
PACKAGES := flexvar_ref:flexvar_ref flexvar_runtime:runtime flexvar_export:export flexvar_serving:serving flexvar_evaluation:evaluation flexvar_bench:benchmarks
# How mypy sees the packages: by import name, although the folders are called otherwise.
LINKS := .mypy_cache/packages

.DELETE_ON_ERROR:
.PHONY: help venv lint test test-slow test-kernels test-engines test-serving test-lowest fuzz demo bench gpu-rehearsal clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

# Make a virtual environment: $(call install,FOLDER,EXTRAS,WHAT IT HOLDS)
define install
@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python %d.%d is too old. Name Python 3.11 or later: make PYTHON=python3.11" % sys.version_info[:2])'
@echo "==> $(1): installing $(3)"
@"$(PYTHON)" -m venv "$(1)"
@"$(1)/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
@"$(1)/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[$(2)]"
@touch "$(1)/.installed"
endef

venv: $(STAMP) ## make the development environment .venv, again when its requirements change

$(STAMP): $(REQUIREMENTS)
	$(call install,$(VENV),$(EXTRAS),$(VENV_HOLDS))

$(SERVING_STAMP): $(STAMP)
	@echo "==> $(VENV): installing $(SERVING_HOLDS)"
	@"$(BIN)/python" -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[serve-dev]"
	@touch "$@"

$(DEMO_STAMP): $(REQUIREMENTS)
	$(call install,$(DEMO_VENV),$(DEMO_EXTRAS),$(DEMO_HOLDS))

$(LOWEST_STAMP): $(REQUIREMENTS) tests/packaging/lowest.py
	@echo "==> $(LOWEST_VENV): installing flexvar-deploy[$(LOWEST_EXTRAS)] with the lowest versions that pyproject.toml allows"
	@"$(PYTHON)" -m venv --clear "$(LOWEST_VENV)"
	@"$(PYTHON)" tests/packaging/lowest.py $(LOWEST_EXTRAS) > "$(LOWEST_VENV)/lowest.txt"
	@"$(LOWEST_VENV)/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools pytest pytest-timeout hypothesis
	@"$(LOWEST_VENV)/bin/python" -m pip install -qq --disable-pip-version-check -c "$(LOWEST_VENV)/lowest.txt" --no-build-isolation -e ".[$(LOWEST_EXTRAS)]"
	@touch "$@"

lint: venv ## run ruff, its formatter and mypy
	@echo "==> ruff"
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@echo "==> mypy"
	@mkdir -p $(LINKS)
	@for pair in $(PACKAGES); do ln -sfn "../../$${pair#*:}" "$(LINKS)/$${pair%%:*}"; done
	@"$(BIN)/mypy"

test: lint ## run the linters, then every test without the marks slow, engines, kernels, serving and fuzz
	@echo "==> pytest"
	@OMP_NUM_THREADS=1 "$(BIN)/pytest" --quiet -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: venv ## run the tests marked slow
	@"$(BIN)/pytest" --quiet -m slow $(PYTEST_ARGS) || [ $$? -eq 5 ]  # 5: there are none

test-kernels: venv ## run the tests marked kernels: more sizes of the GPU kernels, on a CPU
	@"$(BIN)/pytest" --quiet -n $(WORKERS) --dist worksteal -m kernels $(PYTEST_ARGS)

test-engines: venv ## run the tests marked engines: they build d16 for every published schedule with TensorRT-RTX; no GPU needed
	@"$(BIN)/pytest" --quiet -m engines $(PYTEST_ARGS)

test-serving: $(SERVING_STAMP) ## run the tests marked serving: OpenAI's client, random requests, load, a browser (chromium, if it is there); a quarter of an hour
	@"$(BIN)/pytest" --quiet -m serving $(PYTEST_ARGS)

fuzz: venv ## run random command lines, calls, pictures and bundles: some 24,000 cases in about an hour
	@"$(BIN)/pytest" --quiet -m fuzz -s tests/fuzz $(PYTEST_ARGS)

test-lowest: venv $(LOWEST_STAMP) ## run the tests of the runtime with the lowest versions of its dependencies, without torch
	@rm -rf "$(LOWEST_OUT)" && mkdir -p "$(LOWEST_OUT)"
	@"$(BIN)/python" -c 'import sys; from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints; write_checkpoints(sys.argv[1], tiny_transformer(), TINY_TOKENIZER)' "$(LOWEST_OUT)"
	@"$(BIN)/flexvar" export "$(LOWEST_OUT)/transformer.pth" --vae "$(LOWEST_OUT)/vae.pth" -o "$(LOWEST_OUT)/tiny.bundle" > /dev/null
	@OMP_NUM_THREADS=1 FLEXVAR_TEST_BUNDLE="$(abspath $(LOWEST_OUT))/tiny.bundle" "$(LOWEST_VENV)/bin/pytest" --quiet tests/runtime tests/e2e/test_cpu_only_environment.py $(PYTEST_ARGS)

demo: $(DEMO_STAMP) ## export, verify and run the demo model, into DEMO_OUT (demo/out); makes an environment of its own, .venv-demo
	@"$(DEMO_VENV)/bin/python" demo/run.py --out "$(DEMO_OUT)"

bench: venv ## measure the models of benchmarks/standard.toml and draw the report, into BENCH_OUT (build/bench); up to half an hour
	@mkdir -p "$(BENCH_OUT)"
	@"$(BIN)/flexvar" bench run --suite benchmarks/standard.toml -o "$(BENCH_OUT)/results.jsonl" --force
	@"$(BIN)/flexvar" bench report "$(BENCH_OUT)/results.jsonl" -o "$(BENCH_OUT)/page"

gpu-rehearsal: venv ## rehearse gpu_check.py on this CPU; results in REHEARSAL_OUT (build/gpu-rehearsal); takes about two minutes
	@OMP_NUM_THREADS=1 "$(BIN)/python" benchmarks/gpu_check.py --rehearse --out "$(REHEARSAL_OUT)"

clean: ## remove what was generated, except the virtual environments
	@rm -rf build dist demo/out flexvar_deploy.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find flexvar_ref runtime export serving evaluation benchmarks tests demo -type d -name __pycache__ -prune -exec rm -rf {} +
