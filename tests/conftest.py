"""One thread for each test process, for threads that wait for each other cost more than they give on small models; and
what is imported is looked at no more when garbage is collected."""

import gc
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# Files of few but long tests: begun first, so that at the end no process works at one of them alone.
LONG = (
    "demo/test_demo", "cli/test_hosts", "cli/test_launch", "cli/test_independent", "adapters/test_roles",
    "engines/test_zero_roles", "engines/test_zero", "engines/test_many_processes", "cli/test_accelerated",
    "adapters/test_shards", "run/test_merge", "run/test_checkpoint_ranks", "dashboard/browser/test_live_run",
    "run/test_distillation_processes", "run/test_many_processes", "run/test_ladder", "run/test_every_family",
    "families/test_weights", "run/test_trackers", "cli/test_stop",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # With --no-loadscope-reorder xdist hands files out in this order.
    tests = Path(__file__).parent
    places = {tests / f"{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    # A learner collects garbage before it starts, so tests do so many times over. To look at half a million objects of
    # imported modules, which never become garbage, would take a third of the time of a small run.
    gc.collect()
    gc.freeze()
