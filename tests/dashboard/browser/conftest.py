"""One Chromium for the tests of a file; without it they are skipped, but not in continuous integration."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

if find_spec("playwright") is None and not os.environ.get("CI"):
    collect_ignore_glob = ["*.py"]


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Of this file alone: playwright's loop runs in the thread of the tests, and others start loops of their own."""
    from playwright.sync_api import expect

    from tests.dashboard.browser.watching import CHROMIUM, chromium

    if CHROMIUM is None and not os.environ.get("CI"):
        pytest.skip("no Chromium here")
    expect.set_options(timeout=20_000)  # beside other tests on a slow machine; it waits no longer than it must
    with chromium() as started:
        yield started
