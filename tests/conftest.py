"What several tests use: where the checkout is, and the `selfsupnas` command as a shell runs it."
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    "Figures are compared with their baselines however pytest was called: without this, only with --mpl."
    config.option.mpl = True


@pytest.fixture(scope="session")
def command():
    "command(*words, cwd=...) runs the installed console script and returns the CompletedProcess."
    script = Path(sys.executable).with_name("selfsupnas")
    def run(*words, cwd, **environment):
        return subprocess.run([script, *map(str, words)], cwd=cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=900)
    return run
