# Each command sets up all that it needs: the virtual environment in .venv, and a broker.
#   BROKER=auto|container|local|URL    where RabbitMQ comes from
#   PYTEST_ARGS='-k rpc'               more for pytest; the tests wait a lot, so two run at a time
#   PYTHON=python3.14                  the interpreter for a new .venv ("make clean" removes the old)

PYTHON ?= python3
BROKER ?= auto
VENV_PYTHON = .venv/bin/python

.PHONY: help demo test broker lint clean

help:
	@echo 'make demo      play a part of each of the four lessons'
	@echo 'make test      run the tests'
	@echo 'make broker    keep a RabbitMQ on localhost:5672 until Ctrl+C'
	@echo 'make lint      check format, style and types'
	@echo 'make clean     remove the virtual environment and all caches'
	@echo 'BROKER=auto|container|local|URL says where RabbitMQ comes from.'

demo: .venv/ready
	@$(VENV_PYTHON) -m tools.broker --install --broker='$(BROKER)'
	@$(VENV_PYTHON) -m tools.demo --broker='$(BROKER)'

test: .venv/ready
	@$(VENV_PYTHON) -m tools.broker --install --broker='$(BROKER)'
	$(VENV_PYTHON) -m pytest -n 2 --broker='$(BROKER)' $(PYTEST_ARGS)

broker: .venv/ready
	@$(VENV_PYTHON) -m tools.broker --broker='$(BROKER)'

lint: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy .

clean:
	rm -rf .venv .*_cache .hypothesis *.egg-info

# Debian and Ubuntu have venv in a package of its own.
VENV_PACKAGE = $(notdir $(PYTHON))-venv

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo 'Installing $(VENV_PACKAGE), with apt-get'; \
			apt-get -qq update && apt-get -qq install -y --no-install-recommends $(VENV_PACKAGE) >/dev/null; \
		else \
			echo '$(PYTHON) has no venv. On Debian or Ubuntu, this installs it:'; \
			echo '    sudo apt-get update && sudo apt-get install -y $(VENV_PACKAGE)'; \
			exit 1; \
		fi; }
	@echo 'Making .venv'
	@$(PYTHON) -m venv --clear .venv
	@.venv/bin/pip install -qq --disable-pip-version-check -e '.[test,lint]'
	@touch $@
