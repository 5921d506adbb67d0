# Each command installs what it needs: Python packages in .venv, and a broker.
#   BROKER=auto|container|local|URL    where RabbitMQ comes from
#   PYTEST_ARGS='-k rpc'               more options for pytest
#   BENCH_ARGS='-k rpc'                more options for tools.bench
#   PYTHON=python3.14                  the Python for a new .venv ("make clean" removes the old one)

PYTHON ?= python3
BROKER ?= auto
VENV_PYTHON = .venv/bin/python

.PHONY: help demo test test-cluster test-endurance test-speed promises bench broker lint clean

help:
	@echo 'make demo            play the first part of each lesson'
	@echo 'make test            run the tests, four at a time'
	@echo 'make test-cluster    run the tests of lessons 9, 11 and 12 that start containers of their own'
	@echo 'make test-endurance  run the tests that kill scripts and RabbitMQ many times'
	@echo 'make test-speed      run the tests that measure'
	@echo 'make promises        list what the tests prove'
	@echo 'make bench           measure how fast the scripts are, in five minutes; BENCH_ARGS="-k rpc": in one'
	@echo 'make broker          keep a RabbitMQ on localhost:5672 until Ctrl+C'
	@echo 'make lint            check format, style, types and the files for Docker and GitHub'
	@echo 'make clean           remove all that these commands have made: .venv and caches'
	@echo 'BROKER=auto|container|local|URL says where RabbitMQ comes from.'

demo: .venv/has-tools
	@$(VENV_PYTHON) -m tools.broker --install --broker='$(BROKER)'
	@$(VENV_PYTHON) -m tools.demo --broker='$(BROKER)'

test: .venv/has-test
	@$(VENV_PYTHON) -m tools.broker --install --broker='$(BROKER)'
	$(VENV_PYTHON) -m pytest -n 4 --dist=worksteal --durations=10 --broker='$(BROKER)' $(PYTEST_ARGS)

test-cluster: .venv/has-test
	$(VENV_PYTHON) -m pytest -m cluster -n 3 --dist=loadfile --broker=container $(PYTEST_ARGS)

test-endurance: .venv/has-test
	@$(VENV_PYTHON) -m tools.broker --install --broker='$(BROKER)'
	$(VENV_PYTHON) -m pytest -m endurance -n 4 --dist=worksteal --broker='$(BROKER)' $(PYTEST_ARGS)

test-speed: .venv/has-test
	@$(VENV_PYTHON) -m tools.broker --install --broker='$(BROKER)'
	$(VENV_PYTHON) -m pytest -m speed --broker='$(BROKER)' $(PYTEST_ARGS)

promises: .venv/has-test
	@$(VENV_PYTHON) -m pytest --collect-only -p no:terminal -o addopts= $(PYTEST_ARGS)

bench: .venv/has-bench
	@$(VENV_PYTHON) -m tools.broker --install --broker='$(BROKER)'
	@$(VENV_PYTHON) -m tools.bench --broker='$(BROKER)' $(BENCH_ARGS)

broker: .venv/has-tools
	@$(VENV_PYTHON) -m tools.broker --broker='$(BROKER)'

lint: .venv/has-lint
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy .
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/lesson.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml */docker-compose.yml
	.venv/bin/kubernetes-validate --strict --quiet service/kubernetes.yml
	@if command -v shellcheck >/dev/null; then echo 'shellcheck .ci/run .ci/provision security/*.sh'; shellcheck .ci/run .ci/provision security/*.sh; \
		else echo 'Not checked: .ci/run, .ci/provision and security/*.sh, because shellcheck is not installed'; fi

clean:
	rm -rf .venv .*_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# The packages of one of the groups in pyproject.toml. Older versions of pip know no groups.
.venv/has-%: pyproject.toml | .venv/bin/pip
	@echo 'Installing the Python packages for $*'
	@.venv/bin/pip install -qq --disable-pip-version-check 'pip>=25.1'
	@.venv/bin/pip install -qq --disable-pip-version-check --group $*
	@touch $@

# Debian and Ubuntu have venv in a package of its own.
VENV_PACKAGE = $(notdir $(PYTHON))-venv

.venv/bin/pip:
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo 'Installing $(VENV_PACKAGE) with apt-get'; \
			apt-get -qq update && apt-get -qq install -y --no-install-recommends $(VENV_PACKAGE) >/dev/null; \
		else \
			echo '$(PYTHON) has no venv. On Debian or Ubuntu, this installs it:'; \
			echo '    sudo apt-get update && sudo apt-get install -y $(VENV_PACKAGE)'; \
			exit 1; \
		fi; }
	@echo 'Making .venv'
	@$(PYTHON) -m venv --clear .venv
