# What a developer runs; `make` alone lists it. Needs GNU make 4, bash, git, and Python 3.11 or newer with venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
ifneq (,$(filter 3.%,$(MAKE_VERSION)))
$(error this is GNU make $(MAKE_VERSION); version 4 is needed (macOS: brew install make, then gmake))
endif

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= streetscenes
ARGS ?=
WORKERS ?= 2
SEEDS ?= 0 1 2
ARMS ?= labels both jigsaw consistency
FOUND ?= nbs/experiments/records/compare/found
COMPARE ?= runs/compare
PARTS ?=
ADDRESS ?=
export PATH := $(abspath $(BIN)):$(PATH)

FRONT ?= runs/demo-streetscenes/search

.PHONY: help env demo compare budgets rivals pareto camvid bench-quick bench-speed bench-gpu terms loader shortcuts test test-long test-oldest faults kills stops soak test-gpu test-browser drift lint notebook-tests notebooks readme evidence-check imports docs hooks clean

help: ## this list
	@echo "make TARGET, where TARGET is:"
	sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

env: $(VENV)/.installed ## create or update the environment .venv; again when settings.ini changes

$(VENV)/.installed: settings.ini setup.py
	@free=$$(df -Pm . | awk 'NR == 2 {print $$4}')
	$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || {
	  echo "== env: $(PYTHON) is not Python 3.11 or newer with venv; choose one: make env PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || test "$$free" -gt 9000 || {
	  echo "== env: 9 GB of free disk space are needed, but only $$free MB are free" >&2; exit 1; }
	case "$(CURDIR)" in *:*) echo "== env: the path of this folder contains ':', which environments do not allow: move it" >&2; exit 1;; esac
	echo "== env: installing selfsupnas and its dependencies into $(VENV), with $(PYTHON): about 7 GB on disk, of which"
	echo "== env: 3 GB are downloaded; 2 to 3 minutes with a fast connection or a pip cache"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	cache="$${PIP_CACHE_DIR:-$${XDG_CACHE_HOME:-$$HOME/.cache}/pip}" # pip fails if it cannot write to its cache
	mkdir -p "$$cache" 2>/dev/null && test -w "$$cache" || export PIP_NO_CACHE_DIR=1
	python -m pip install --upgrade pip
	python -m pip install --editable '.[dev,bluemarble,rivals,export,tensorboard,workflow]'
	python -c 'import torch, torchvision' || {
	  echo "the versions of torch and torchvision do not match: remove $(VENV) and run make env again" >&2; exit 1; }
	touch $@
	printf '%s\n' "== env: ready. Next:" "     make demo                          search, retrain, evaluate, in minutes" \
	  "     source $(BIN)/activate          then: jupyter lab nbs/00_tour.ipynb, or: selfsupnas --help" \
	  "     make test                          run the quick tests: at most 10 minutes"

demo: env ## search, retrain with and without unlabelled images, evaluate, in minutes; DATA=streetscenes, bluemarble or camvid; ARGS='--steps 100'
	@echo "== demo: selfsupnas demo --data $(DATA) $(ARGS)"
	selfsupnas demo --data $(DATA) $(ARGS)

# One process per core, one thread each. Runs that have a record are skipped. The architecture and the split are committed with the records.
compare: env ## only labels against the full objective, 3 seeds, on the committed architecture: nbs/experiments/records
	@echo "== compare: $(ARMS) with seeds $(SEEDS), $(WORKERS) at a time, into $(COMPARE)"
	run_arm() {
	  case $$1 in labels) losses="";; jigsaw) losses="--w-jig 0.1";; consistency) losses="--w-semi 1";; both) losses="--w-jig 0.1 --w-semi 1";; esac
	  to=$(COMPARE)/$$1-$$2
	  test -e $$to/evaluate/evaluate-record.json && return
	  echo "== compare: $$to"
	  { selfsupnas retrain --folder $$to/retrain --architecture $(FOUND)/search/architecture.json --split-folder $(FOUND)/search/split --seed $$2 --consistency fixmatch $$losses
	    selfsupnas evaluate --folder $$to/evaluate --network $$to/retrain --baselines; } >$$to.log 2>&1 || { tail -5 $$to.log; exit 255; }
	}
	export -f run_arm
	mkdir -p $(COMPARE)
	for seed in $(SEEDS); do for arm in $(ARMS); do echo $$arm $$seed; done; done \
	  | OMP_NUM_THREADS=1 xargs -P $(WORKERS) -L 1 bash -c 'run_arm "$$0" "$$1"'

# Runs that have a record are skipped.
budgets: env ## do searches reach their budgets? mu 0.2, 0.4, 0.6, short searches of 12 layers
	@echo "== budgets: into runs/budgets"
	for mu in 0.2 0.4 0.6; do echo $$mu; done | OMP_NUM_THREADS=1 xargs -P $(WORKERS) -I MU bash -c \
	  'test -e runs/budgets/MU/search-record.json || selfsupnas search --folder runs/budgets/MU --layers 12 --steps 300 --budget MU'

rivals: env ## derived architectures of 3 searches against 10 random ones of equal cost, from scratch; after make demo
	@echo "== rivals: of $(FRONT), into runs/rivals"
	split="--split-folder $(FRONT)/split"
	run_once() { test -e $$1 || selfsupnas $$2 --folder $$(dirname $$1) "$${@:3}"; }
	for t in 0 1; do run_once runs/rivals/front-$$t/pareto-record.json pareto --search $(FRONT) --budgets 0.5 --initialise scratch --steps 600 --random 5 --seed $$t; done
	for s in 1 2; do run_once runs/searches/$$s/search-record.json search $$split --seed $$s; done
	ln -sfn $(abspath $(FRONT)) runs/searches/0
	for s in 0 1 2; do for t in 0 1; do
	  run_once runs/rivals/derived/$$s-$$t/retrain-record.json retrain $$split --architecture runs/searches/$$s/architecture.json --steps 600 --seed $$t
	done; done

pareto: env ## one search, three budgets, against random and hand-crafted networks; after make demo
	@echo "== pareto: of $(FRONT), into runs/pareto"
	selfsupnas pareto --folder runs/pareto --search $(FRONT) --budgets 0.3 0.5 0.7 --random 2 \
	  --baselines lraspp_mobilenet_v3_large unet_resnet18

# Hours to days. Stages that have a record are skipped, stopped runs continue; ARGS=-n shows the plan, ARGS="only='0.125/searched-*'" selects some.
# After a kill or a power cut Snakemake asks for ARGS=--unlock, once.
camvid: env ## the method, its rivals and its ablation on CamVid, 2 fractions, 3 seeds: nbs/experiments/records/camvid
	@echo "== camvid: into runs/camvid, records into nbs/experiments/records/camvid"
	snakemake -s nbs/experiments/compare.smk --cores $(WORKERS) --keep-going --config folder=runs/camvid records=nbs/experiments/records/camvid $(ARGS)

bench-quick: env ## a small make camvid in about 30 minutes: 1 fraction, 1 seed, 200 steps, two rivals
	@echo "== bench-quick: into runs/bench-quick"
	snakemake -s nbs/experiments/compare.smk --cores $(WORKERS) --keep-going --configfile nbs/experiments/bench-quick.yaml --config $(ARGS)

# Parts that have a record are skipped. The memory part needs Linux.
bench-speed: env ## speed and memory on a processor, as ratios, under 20 minutes; PARTS='step closed' selects some
	@echo "== bench-speed: into runs/speed"
	python nbs/experiments/benchmarks.py $(PARTS) $(ARGS)

# Stopped after 10 minutes; parts that have a record are skipped, so that a second call measures what is left.
bench-gpu: env ## speed and memory on one GPU, under 10 minutes; PARTS='networks' selects some; ARGS='--images 4' for a small one
	@echo "== bench-gpu: into runs/speed-gpu"
	status=0
	timeout --signal=INT --kill-after=10 590 python nbs/experiments/benchmarks.py $(PARTS) --device cuda --precision bf16 \
	  --images 8 --size 768 768 --rounds 5 --folder runs/speed-gpu $(ARGS) || status=$$?
	test $$status -ne 124 || echo "== bench-gpu: stopped after 10 minutes; the same command measures the parts that are left" >&2
	exit $$status

terms: env ## time of a search step with all terms, and without each term
	@echo "== terms: into runs/terms"
	python nbs/experiments/benchmarks.py removal -p folder runs/terms -p steps 10

loader: env ## time of a search step and of the loader alone, two workers; CamVid if SELFSUPNAS_DATA has it
	@echo "== loader: into runs/loader"
	rate() { python nbs/experiments/benchmarks.py loader -p folder runs/loader/$$1 -p workers 2 -p steps 20 "$${@:2}"; }
	rate streetscenes
	if [ -d "$${SELFSUPNAS_DATA:-}/camvid" ]; then
	  rate camvid -p data camvid -p size '(120, 160)' -p label_fraction 1/8
	  rate camvid-decoded -p data camvid -p size '(120, 160)' -p label_fraction 1/8 -p cache_gb 0.
	fi

# Runs that have a record are skipped; cells have no time limit.
shortcuts: env ## jigsaw networks without gaps and without normalised tiles, 3 seeds: nbs/experiments/shortcuts.ipynb
	@echo "== shortcuts: records into nbs/experiments/records/shortcuts"
	jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.kernel_name=python3 \
	  --ExecutePreprocessor.timeout=-1 --log-level=ERROR nbs/experiments/shortcuts.ipynb
	nbdev_clean

# Tests run in the same surroundings everywhere: a temporary home folder, removed when all tests pass; scenes drawn once;
# one thread per worker, because workers would compete for the cores; no GPU, because some tests compare exact bits.
define ALONE
export HOME=$$(mktemp -d) CUDA_VISIBLE_DEVICES= MPLBACKEND=Agg OMP_NUM_THREADS=1
export TMPDIR=$$HOME SELFSUPNAS_CACHE="$(abspath $(VENV))/cache"
endef

test: env drift lint ## the quick tests: at most 10 minutes on 2 cores
	@echo "== test: the quick tests of tests/, $(WORKERS) at a time; make test-long runs the others and all notebooks"
	$(ALONE)
	python -m pytest -q -n $(WORKERS) --dist loadfile -o tmp_path_retention_policy=failed tests
	rm -rf "$$HOME"

test-long: env notebook-tests ## kills, several processes, a long run, a browser, and every notebook
	@echo "== test-long: the long tests of tests/, $(WORKERS) at a time"
	python -m pip install -q --editable '.[browser,docs]'
	$(ALONE)
	python -m pytest -q -m long -n $(WORKERS) --dist loadfile -rs -o tmp_path_retention_policy=failed tests
	rm -rf "$$HOME"

# With the oldest versions that settings.ini allows, in a separate environment of another 7 GB.
test-oldest: ## the quick tests with the oldest versions (tests/oldest.txt), on Python 3.11: .venv-oldest
	@echo "== oldest: installing the versions of tests/oldest.txt into .venv-oldest"
	test -x .venv-oldest/bin/python || python3.11 -m venv .venv-oldest
	export PATH="$(CURDIR)/.venv-oldest/bin:$$PATH"
	python -m pip install -c tests/oldest.txt --editable '.[dev,bluemarble,rivals,export,tensorboard,workflow]'
	$(ALONE)
	python -m pytest -q -n $(WORKERS) --dist loadfile -o tmp_path_retention_policy=failed tests
	rm -rf "$$HOME"

# The state is compared before and after, so that uncommitted changes are allowed.
drift: env ## export and clean the notebooks; fails if a file changes
	@live=$$(grep -rl --include='*.ipynb' --exclude-dir=.ipynb_checkpoints 'vnd.jupyter.widget-view' nbs || true)
	if [ -n "$$live" ]; then
	  printf '%s\n' "These notebooks were run in JupyterLab and hold widgets that work only there:" "$$live" \
	    "git checkout FILE restores the committed outputs; make notebooks NB=FILE makes new ones." >&2
	  exit 1
	fi
	echo "== drift: exporting and cleaning the notebooks; no file may change"
	state() { find nbs selfsupnas -name .ipynb_checkpoints -prune -o -type f \( -name '*.ipynb' -o -name '*.py' \) \
	  -exec cksum {} + | sort -k 3; }
	before=$$(state)
	nbdev_export
	nbdev_clean
	changed=$$({ diff <(echo "$$before") <(state) || true; } | sed -n 's/^[<>] [0-9]* [0-9]* //p' | sort -u)
	if [ -n "$$changed" ]; then
	  printf '%s\n' "These files did not match and have now been exported and cleaned:" "$$changed" \
	    "Check the changes with git diff, commit them, and run again. If you only ran a notebook," \
	    "git checkout FILE restores its committed outputs." >&2
	  exit 1
	fi

lint: env ## check the notebooks and tests for mistakes by ruff: ruff.toml
	@echo "== lint: ruff check nbs tests"
	ruff check nbs tests

notebook-tests: env ## run every notebook from top to bottom
	@echo "== notebooks: running each from top to bottom, $(WORKERS) at a time"
	$(ALONE)
	nbdev_test --n_workers $(WORKERS) --timing
	rm -rf "$$HOME"

kills: env ## kill a search and a retraining 30 times each at random moments: results must not change
	@echo "== kills: tests/test_kills.py"
	SELFSUPNAS_KILLS=30 python -m pytest -q -s -m long tests/test_kills.py

stops: env ## stop runs in every way at every moment: runs/stops.md
	@echo "== stops: into runs/stops.md"
	mkdir -p runs
	SELFSUPNAS_STOPS="$(CURDIR)/runs/stops.md" python -m pytest -q -m long tests/test_stops.py

soak: env ## 2,000 steps of a search: memory and open files must not grow
	@echo "== soak: tests/test_soak.py"
	SELFSUPNAS_SOAK=2000 python -m pytest -q -s -m long tests/test_soak.py

faults: env ## the messages for bad inputs and faults, as a list: runs/faults.md
	@echo "== faults: into runs/faults.md"
	mkdir -p runs
	SELFSUPNAS_FAULTS="$(CURDIR)/runs/faults.md" python -m pytest -q tests/test_faults.py

test-gpu: env ## compare CUDA with the processor; skipped without a GPU
	@echo "== test-gpu: tests/test_gpu.py"
	SELFSUPNAS_GPU=1 python -m pytest -q -rs tests/test_gpu.py

test-browser: env ## the tour in JupyterLab in a browser; needs chromium; SELFSUPNAS_SHOTS=FOLDER stores screenshots
	@echo "== test-browser: tests/test_browser.py"
	python -m pip install -q --editable '.[browser]'
	python -m pytest -q -rs -m long tests/test_browser.py

notebooks: env ## execute all notebooks in place and print their times; NB='nbs/space/03_gate.ipynb' for one
	@for nb in $(or $(NB),$$(git ls-files 'nbs/*.ipynb' | grep -v nbs/runs/)); do
	  test -e "$$nb" || continue
	  echo "== notebooks: executing $$nb"
	  begun=$$SECONDS
	  jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.kernel_name=python3 \
	    --ExecutePreprocessor.timeout=3000 --ExecutePreprocessor.store_widget_state=False --log-level=ERROR "$$nb"
	  echo "== notebooks: $$nb took $$((SECONDS - begun)) s"
	done
	nbdev_clean

evidence-check: env ## recompute the tables of nbs/experiments/evidence.ipynb from the records, compare with the page
	python -m pytest -q tests/test_evidence.py

readme: env ## README.md from nbs/index.ipynb; ADDRESS=https://github.com/OWNER/NAME sets the repository for Colab and Binder
	python tests/readme.py $(ADDRESS)

imports: env ## draw the imports between folders, nbs/figures/imports.png; fails if one points against the reading order
	@python tests/imports.py

# Links between notebooks become links between pages; images are embedded.
docs: env ## the notebooks and the API as web pages: _docs/index.html
	@echo "== docs: into _docs/"
	python -m pip install -q --editable '.[docs]'
	sphinx-build -q -W --keep-going -b html nbs _docs
	rm -rf jupyter_execute
	echo "== docs: open _docs/index.html"

hooks: ## merge notebooks cell by cell in this checkout (git config, local)
	@echo "== hooks: including .gitconfig into this checkout's git configuration"
	git config --local include.path ../.gitconfig

clean: ## remove caches and build files, but not .venv and runs/
	@echo "== clean: removing caches and build files"
	rm -rf build dist _docs jupyter_execute _proc nbs/api .pytest_cache .hypothesis .ruff_cache
	find . -path "./.venv*" -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
