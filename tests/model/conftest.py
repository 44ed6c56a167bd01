"""llama.cpp for the tests of what is written for it; they are skipped where it is not installed (`make test` installs it)."""

import pytest


@pytest.fixture
def llama():
    """Loads files into llama.cpp, and lets go of them."""
    from llamacpp import LlamaCpp

    loaded = []

    def load(path):
        loaded.append(LlamaCpp(path))
        return loaded[-1]

    yield load
    for one in loaded:
        one.close()
