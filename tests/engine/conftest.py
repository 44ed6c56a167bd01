"""The CPU's kernels are there from the first test on: an engine forgets its prefixes when they come."""

import pytest

from pascaline.model import native


@pytest.fixture(scope="session", autouse=True)
def kernels() -> str:
    """Why there are none, or ""."""
    return native.wait()
