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
export PATH := $(abspath $(BIN)):$(PATH)

FRONT ?= runs/demo-streetscenes/search

.PHONY: help env demo compare budgets rivals pareto camvid bench-quick bench-speed terms loader shortcuts test test-long test-oldest faults kills stops soak test-gpu test-browser drift notebook-tests notebooks imports docs hooks clean

help: ## this list
	@echo "make TARGET, where TARGET is:"
	sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

env: $(VENV)/.installed ## the environment .venv, with all that is needed; again when settings.ini changes

$(VENV)/.installed: settings.ini setup.py
	@free=$$(df -Pm . | awk 'NR == 2 {print $$4}')
	$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || {
	  echo "== env: $(PYTHON) is no Python 3.11 or newer with venv; name one: make env PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || test "$$free" -gt 9000 || {
	  echo "== env: 9 GB of disk are needed, and $$free MB are free here" >&2; exit 1; }
	case "$(CURDIR)" in *:*) echo "== env: the path of this folder holds ':', which no environment can have: move it" >&2; exit 1;; esac
	echo "== env: installing selfsupnas and what it needs into $(VENV), with $(PYTHON): about 7 GB on disk, of which 3 GB"
	echo "== env: are downloaded once; 2 to 3 minutes where downloads are quick or kept, else as long as 3 GB take"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	kept="$${PIP_CACHE_DIR:-$${XDG_CACHE_HOME:-$$HOME/.cache}/pip}" # pip fails where it cannot write there
	mkdir -p "$$kept" 2>/dev/null && test -w "$$kept" || export PIP_NO_CACHE_DIR=1
	python -m pip install --upgrade pip
	python -m pip install --editable '.[dev,bluemarble,rivals,export,tensorboard,slurm]'
	python -c 'import torch, torchvision' || {
	  echo "torch and torchvision do not match by minor version: remove $(VENV) and run make env again" >&2; exit 1; }
	touch $@
	printf '%s\n' "== env: ready. Next:" "     make demo                          search, retrain, evaluate, in minutes" \
	  "     source $(BIN)/activate          then: jupyter lab nbs/00_tour.ipynb, or: selfsupnas --help" \
	  "     make test                          does all of it work here? at most 10 minutes"

demo: env ## search, retrain, evaluate in minutes; DATA=streetscenes, bluemarble or camvid; ARGS='-p steps 100'
	@echo "== demo: selfsupnas demo --data $(DATA) $(ARGS)"
	selfsupnas demo --data $(DATA) $(ARGS)

# A process a core, one thread each; what has a record is not run again. The architecture and the split are committed beside the records.
compare: env ## labels alone against the whole objective, 3 seeds, on the committed architecture: nbs/experiments/records
	@echo "== compare: $(ARMS) with seeds $(SEEDS), $(WORKERS) at a time, into $(COMPARE)"
	run_arm() {
	  case $$1 in labels) off="-p w_jig 0 -p w_semi 0";; jigsaw) off="-p w_semi 0";; consistency) off="-p w_jig 0";; both) off="";; esac
	  to=$(COMPARE)/$$1-$$2
	  test -e $$to/evaluate/evaluate-record.json && return
	  echo "== compare: $$to"
	  { selfsupnas retrain --folder $$to/retrain -p architecture $(FOUND)/search/architecture.json -p split_folder $(FOUND)/search/split -p seed $$2 $$off
	    selfsupnas evaluate --folder $$to/evaluate -p network $$to/retrain -p baselines '()'; } >$$to.log 2>&1 || { tail -5 $$to.log; exit 255; }
	}
	export -f run_arm
	mkdir -p $(COMPARE)
	for seed in $(SEEDS); do for arm in $(ARMS); do echo $$arm $$seed; done; done \
	  | OMP_NUM_THREADS=1 xargs -P $(WORKERS) -L 1 bash -c 'run_arm "$$0" "$$1"'

# What has a record is not run again.
budgets: env ## does a search end at the budget that it was asked for? mu 0.2, 0.4, 0.6, short searches of 12 layers
	@echo "== budgets: into runs/budgets"
	for mu in 0.2 0.4 0.6; do echo $$mu; done | OMP_NUM_THREADS=1 xargs -P $(WORKERS) -I MU bash -c \
	  'test -e runs/budgets/MU/search-record.json || selfsupnas search --folder runs/budgets/MU -p layers 12 -p steps 300 -p budget MU'

rivals: env ## derived architectures of 3 searches against 10 random ones of their cost, all from scratch; after make demo
	@echo "== rivals: of $(FRONT), into runs/rivals"
	split="-p split_folder $(FRONT)/split"
	once() { test -e $$1 || selfsupnas $$2 --folder $$(dirname $$1) "$${@:3}"; }
	for t in 0 1; do once runs/rivals/front-$$t/pareto-record.json pareto -p search $(FRONT) -p budgets '(0.5,)' -p initialise scratch -p steps 600 -p random 5 -p seed $$t; done
	for s in 1 2; do once runs/searches/$$s/search-record.json search $$split -p seed $$s; done
	ln -sfn $(abspath $(FRONT)) runs/searches/0
	for s in 0 1 2; do for t in 0 1; do
	  once runs/rivals/derived/$$s-$$t/retrain-record.json retrain $$split -p architecture runs/searches/$$s/architecture.json -p steps 600 -p seed $$t
	done; done

pareto: env ## one search, three budgets, beside random routes and hand-crafted networks; after make demo
	@echo "== pareto: of $(FRONT), into runs/pareto"
	selfsupnas pareto --folder runs/pareto -p search $(FRONT) -p budgets '(0.3, 0.5, 0.7)' -p random 2 \
	  -p baselines "('lraspp_mobilenet_v3_large', 'unet_resnet18')"

# Hours to days. What has a record is not run again, what was stopped goes on; ARGS="-p only '0.125/searched-*'" for a part.
camvid: env ## the method, its rivals and its ablation on CamVid, 2 fractions, 3 seeds: nbs/experiments/records/camvid
	@echo "== camvid: into runs/camvid, records into nbs/experiments/records/camvid"
	python nbs/experiments/campaign.py compare --folder runs/camvid -p records nbs/experiments/records/camvid -p workers $(WORKERS) $(ARGS)

bench-quick: env ## the direction of make camvid in about 30 minutes: 1 fraction, 1 seed, 200 steps, DeepLabV3-ResNet-50 among the rivals
	@echo "== bench-quick: into runs/bench-quick"
	python nbs/experiments/campaign.py compare --folder runs/bench-quick -p workers $(WORKERS) -p fractions '(0.125,)' -p seeds '(0,)' -p steps 200 -p search_steps 300 \
	  -p lrs '(1e-3, 3e-3)' -p trial_steps 30 -p rivals "('deeplabv3_resnet50', 'deeplabv3plus_resnet18')" -p semi_rivals '()' \
	  -p arms "('both', 'labels')" -p open False -p random 1 -p searches '()' $(ARGS)

# What has a record is not measured again. The memory part wants Linux or a GPU.
bench-speed: env ## ratios of speed and memory, under 10 minutes; PARTS='step closed' for some; ARGS='--device cuda --precision bf16'
	@echo "== bench-speed: into runs/speed"
	python nbs/experiments/benchmarks.py $(PARTS) $(ARGS)

terms: env ## time of a search step with all terms, and with each term's weight at 0
	@echo "== terms: into runs/terms"
	python nbs/experiments/benchmarks.py removal -p folder runs/terms -p steps 10

loader: env ## time of a search step beside that of the loader alone, two workers; with CamVid, where SELFSUPNAS_DATA has it
	@echo "== loader: into runs/loader"
	rate() { python nbs/experiments/benchmarks.py loader -p folder runs/loader/$$1 -p workers 2 -p steps 20 "$${@:2}"; }
	rate streetscenes
	if [ -d "$${SELFSUPNAS_DATA:-}/camvid" ]; then
	  rate camvid -p data camvid -p size '(120, 160)' -p label_fraction 1/8
	  rate camvid-decoded -p data camvid -p size '(120, 160)' -p label_fraction 1/8 -p cache_gb 0.
	fi

# What has a record is not run again; a cell may take as long as it needs.
shortcuts: env ## what a jigsaw network learns without gaps and normalised tiles, 3 seeds: nbs/experiments/shortcuts.ipynb
	@echo "== shortcuts: records into nbs/experiments/records/shortcuts"
	jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.kernel_name=python3 \
	  --ExecutePreprocessor.timeout=-1 --log-level=ERROR nbs/experiments/shortcuts.ipynb
	nbdev_clean

# What a test finds is the same everywhere: a home folder of its own, whose temporary files go when all has passed and
# stay to be looked at when something failed; scenes are drawn once. A thread a worker: two workers with a thread for each
# core would wait for one another. What is compared to the last bit is computed on the processor, also where a GPU is.
define ALONE
export HOME=$$(mktemp -d) CUDA_VISIBLE_DEVICES= MPLBACKEND=Agg OMP_NUM_THREADS=1
export TMPDIR=$$HOME SELFSUPNAS_CACHE="$(abspath $(VENV))/cache"
endef

test: env drift ## does it work here? The quick tests: at most 10 minutes on 2 cores
	@echo "== test: the quick tests of tests/, $(WORKERS) at a time; make test-long has the others, and all notebooks"
	$(ALONE)
	python -m pytest -q -n $(WORKERS) --dist loadfile -o tmp_path_retention_policy=failed tests
	rm -rf "$$HOME"

test-long: env notebook-tests ## kills, several processes, a long run, a browser, and every notebook
	@echo "== test-long: the long tests of tests/, $(WORKERS) at a time"
	python -m pip install -q --editable '.[browser]'
	$(ALONE)
	python -m pytest -q -m long -n $(WORKERS) --dist loadfile -rs -o tmp_path_retention_policy=failed tests
	rm -rf "$$HOME"

# With the least versions that settings.ini allows: an environment of its own, another 7 GB.
test-oldest: ## the quick tests with the oldest versions, those of tests/oldest.txt, on Python 3.11: .venv-oldest
	@echo "== oldest: installing the versions of tests/oldest.txt into .venv-oldest"
	test -x .venv-oldest/bin/python || python3.11 -m venv .venv-oldest
	export PATH="$(CURDIR)/.venv-oldest/bin:$$PATH"
	python -m pip install -c tests/oldest.txt --editable '.[dev,bluemarble,rivals,export,tensorboard,slurm]'
	$(ALONE)
	python -m pytest -q -n $(WORKERS) --dist loadfile -o tmp_path_retention_policy=failed tests
	rm -rf "$$HOME"

# The state is compared before and after, so that uncommitted work is no obstacle.
drift: env ## are modules and notebooks in step? exports and cleans
	@echo "== drift: exporting and cleaning the notebooks; nothing may change"
	state() { find nbs selfsupnas -name .ipynb_checkpoints -prune -o -type f \( -name '*.ipynb' -o -name '*.py' \) \
	  -exec cksum {} + | sort -k 3; }
	before=$$(state)
	nbdev_export
	nbdev_clean
	changed=$$({ diff <(echo "$$before") <(state) || true; } | sed -n 's/^[<>] [0-9]* [0-9]* //p' | sort -u)
	if [ -n "$$changed" ]; then
	  printf '%s\n' "These files were out of step. They have just been exported and cleaned:" "$$changed" \
	    "See what changed with git diff, commit it with your work, and run again." >&2
	  exit 1
	fi

notebook-tests: env ## every notebook runs from top to bottom
	@echo "== notebooks: running each from top to bottom, $(WORKERS) at a time"
	$(ALONE)
	nbdev_test --n_workers $(WORKERS) --timing
	rm -rf "$$HOME"

kills: env ## a search and a retraining, killed 30 times each at random moments, end as if nothing had been
	@echo "== kills: tests/test_kills.py"
	SELFSUPNAS_KILLS=30 python -m pytest -q -s -m long tests/test_kills.py

stops: env ## every way to stop a run at every moment, as a table: runs/stops.md
	@echo "== stops: into runs/stops.md"
	mkdir -p runs
	SELFSUPNAS_STOPS="$(CURDIR)/runs/stops.md" python -m pytest -q -m long tests/test_stops.py

soak: env ## 2,000 steps of a search: memory and open files stay what they were
	@echo "== soak: tests/test_soak.py"
	SELFSUPNAS_SOAK=2000 python -m pytest -q -s -m long tests/test_soak.py

faults: env ## what is answered to bad inputs and faults, as a list: runs/faults.md
	@echo "== faults: into runs/faults.md"
	mkdir -p runs
	SELFSUPNAS_FAULTS="$(CURDIR)/runs/faults.md" python -m pytest -q tests/test_faults.py

test-gpu: env ## what a GPU of CUDA computes, against the processor; with none, all of it is skipped
	@echo "== test-gpu: tests/test_gpu.py"
	SELFSUPNAS_GPU=1 python -m pytest -q -rs tests/test_gpu.py

test-browser: env ## the tour in a real JupyterLab in a real browser; needs chromium; SELFSUPNAS_SHOTS=FOLDER keeps screenshots
	@echo "== test-browser: tests/test_browser.py"
	python -m pip install -q --editable '.[browser]'
	python -m pytest -q -rs -m long tests/test_browser.py

notebooks: env ## execute all notebooks in place and say how long each took; NB='nbs/space/03_gate.ipynb' for one
	@for nb in $(or $(NB),$$(git ls-files 'nbs/*.ipynb' | grep -v nbs/runs/)); do
	  test -e "$$nb" || continue
	  echo "== notebooks: executing $$nb"
	  begun=$$SECONDS
	  jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.kernel_name=python3 \
	    --ExecutePreprocessor.timeout=600 --ExecutePreprocessor.store_widget_state=False --log-level=ERROR "$$nb"
	  echo "== notebooks: $$nb took $$((SECONDS - begun)) s"
	done
	nbdev_clean

imports: env ## a picture of the imports between rooms, nbs/figures/imports.png, and their lines; fails if one points against the order
	@python tests/imports.py

# Links between notebooks become links between pages; what a page shows lies in it.
docs: env ## the notebooks as web pages: _docs/index.html
	@echo "== docs: into _docs/"
	for folder in . data data/toy space tasks train stages viz experiments runs; do
	  jupyter nbconvert --to html --embed-images --log-level=ERROR --output-dir _docs/$$folder nbs/$$folder/*.ipynb
	done
	sed -i.bak -E 's/(href="[^":]*)\.ipynb/\1.html/g' $$(find _docs -name '*.html')
	find _docs -name '*.bak' -delete

hooks: ## merge notebooks cell by cell in this checkout (git config, local)
	@echo "== hooks: including .gitconfig into this checkout's git configuration"
	git config --local include.path ../.gitconfig

clean: ## remove caches and build residue; .venv and runs/ stay
	@echo "== clean: removing caches and build residue"
	rm -rf build dist _docs _proc .pytest_cache .hypothesis
	find . -path "./.venv*" -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
