"""A browser for the tests of the page."""

from collections.abc import Iterator

import pytest

from benchmarks.browser import Browser


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser
