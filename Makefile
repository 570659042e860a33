PYTHON ?= python3
BIN := .venv/bin
NUMBERS := $(addprefix tests/,adapters tools/analysis evaluation injection pipelines storage test_diffusion.py test_sampling.py)

.PHONY: quickstart quickstart-text serve adapter check-gpu families promises test fuzz test-other-kernels test-quantised test-serve \
	test-proxy test-ray browser \
	test-floors test-install test-wandb test-optimizers types style docs notebook
.DELETE_ON_ERROR:

# Train 1LoRA on the embedded miniature (minutes on two cores), sample from it, and measure it.
quickstart: .venv/installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train_dit.py
	$(BIN)/python sample.py --beside-base
	$(BIN)/python eval_fid.py

# Teach the text-to-image miniature words for handwritten digits, draw them, read them, and measure how far all else drifted.
quickstart-text: .venv/installed
	$(BIN)/python train_text_to_image.py
	$(BIN)/python sample.py --adapter runs/digit-words --beside-base --per-class 8 --num-inference-steps 20
	$(BIN)/python -m tools.read_digits
	$(BIN)/python eval_fid.py --adapter runs/digit-words

# A page and an API of the miniature and of what quickstart has trained.
serve: .venv/serve/installed
	.venv/serve/bin/python serve.py

# The adapter that ships with the package, so that the page is never empty: the ten digits. Once the miniature is made anew.
adapter: .venv/installed
	$(BIN)/python train_dit.py --output-dir runs/handwritten-digits --fresh --max-train-time 24h
	cp runs/handwritten-digits/onelora_weights.safetensors onelora_diffusion/serving/adapters/handwritten-digits.safetensors

# For whoever has a GPU: about ten minutes, no download, a table. docs/performance.md says what it checks.
check-gpu: .venv/installed
	$(BIN)/python -m tools.check_gpu

# After an update of diffusers: what is recorded of small pipelines of its classes, the table of docs/text_to_image.md;
# with DIFFUSERS=FOLDER, a checkout of its repository, also of every other class that its tests make.
families: .venv/installed
	$(BIN)/python -m tools.try_families $(if $(DIFFUSERS),--diffusers-tests $(DIFFUSERS))
	$(BIN)/python -m tools.try_first_frames $(DIFFUSERS)

# What an adapter of each of them is promised to do: trained, resumed, drawn with, exported.
promises: .venv/installed
	$(BIN)/python -m tools.try_promises $(if $(DIFFUSERS),--diffusers-tests $(DIFFUSERS))

# Two processes of one thread each; test-other-kernels has as many threads as there are cores.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The tests that compare numbers once more, with the kernels of another machine.
test-other-kernels: .venv/installed
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(BIN)/python -m pytest $(NUMBERS)

# Adapters on bases that torchao, quanto, bitsandbytes and GGUF have packed. Their packages lie apart: diffusers and PEFT
# import whatever is installed, and warn about some of it.
test-quantised: .venv/quantised/installed
	PYTHONPATH=.venv/quantised $(BIN)/python -m pytest tests/injection/test_quantised.py \
		tests/test_text_script.py::test_an_int8_base_trains_what_the_full_one_does \
		tests/benchmarks/test_family_speed.py::test_a_packed_base_is_smaller_and_has_the_peers_that_it_can_have

# `pip install .` into an empty environment; there, without a network, the README's first snippet and, in an empty folder, the
# quickstart's commands with a few updates.
test-install:
	rm -rf build .venv-install
	$(PYTHON) -m venv .venv-install
	.venv-install/bin/python -m pip install --quiet .
	.venv-install/bin/python -m pip check
	cd .venv-install && bin/python ../tools/check_install.py ../README.md

# A run followed at Weights & Biases, offline.
test-wandb: .venv/wandb/installed
	PYTHONPATH=.venv/wandb $(BIN)/python -m pytest tests/test_train_script.py -k wandb_goes

# Resuming with bitsandbytes' and schedule-free's own optimisers; `make test` has a stand-in for the latter.
test-optimizers: .venv/optimizers/installed
	PYTHONPATH=.venv/optimizers $(BIN)/python -m pytest tests/training/test_state.py tests/training/test_run.py

# The server's API, and its page in a real browser. Its packages lie apart, since nothing else needs them.
test-serve: .venv/serve/installed
	.venv/serve/bin/python -m pytest -rs tests/serving

# Two replicas in Ray Serve, on two cores.
test-ray: .venv/ray/installed
	.venv/ray/bin/python -m pytest -rs tests/serving/test_ray.py

# Two servers behind nginx, by the configuration in docs/serving.md.
test-proxy: .venv/serve/installed
	command -v nginx || $$([ "$$(id -u)" = 0 ] || echo sudo) sh -c "apt-get update && apt-get install --yes --no-install-recommends nginx"
	.venv/serve/bin/python -m pytest -rs tests/serving/test_proxy.py

# Chromium, by whoever packages it for this system.
browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
		$$([ "$$(id -u)" = 0 ] || echo sudo) sh -c "apt-get update && apt-get install --yes --no-install-recommends chromium"

# Files changed at random, more of them than `make test` tries, and other ones each time.
fuzz: .venv/installed
	FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest tests/storage/test_fuzz.py tests/training/test_checkpoint_fuzz.py

# The same tests on the oldest versions that pyproject.toml allows, in an environment of their own.
test-floors: .venv-floors/installed
	OMP_NUM_THREADS=1 .venv-floors/bin/python -m pytest -n 2 --dist loadfile

style: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The public names against a type checker (pyright's rules; this build of it brings its own Node.js).
types: .venv/types/installed
	.venv/types/bin/basedpyright --level error --pythonpath $(BIN)/python tests/typing

# The site, in site/. Its builder announces its successor, which is no warning of ours.
docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# docs/notebook.ipynb with outputs of its own code: some minutes on two cores.
notebook: .venv/docs-installed
	PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False docs/notebook.ipynb
	rm -r docs/runs

.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

.venv/types/installed: .venv/installed
	$(PYTHON) -m venv .venv/types
	.venv/types/bin/python -m pip install --quiet basedpyright
	touch $@

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

.venv/quantised/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/quantised torchao optimum-quanto ninja bitsandbytes gguf
	touch $@

.venv/optimizers/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/optimizers bitsandbytes schedulefree
	touch $@

.venv/wandb/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --target .venv/wandb wandb
	touch $@

# Environments upon .venv: what is there is not installed again.
.venv/serve/installed: EXTRAS := browser
.venv/ray/installed: EXTRAS := browser,ray
.venv/serve/installed .venv/ray/installed: .venv/installed
	$(PYTHON) -m venv --clear --without-pip $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/upon.pth
	$(@D)/bin/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

.venv-floors/installed: pyproject.toml constraints-floors.txt
	$(PYTHON) -m venv --clear .venv-floors
	.venv-floors/bin/python -m pip install --quiet --upgrade pip
	.venv-floors/bin/python -m pip install --editable ".[dev]" --constraint constraints-floors.txt
	touch $@
