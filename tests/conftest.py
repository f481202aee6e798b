"""One thread for each test process and what it starts, long files first, and settings that every test leaves alone."""

import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Threads that wait for each other cost more than they give on small models.

torch.set_num_threads(1)
# Of the programs that tests start: two threads each, beside the tests that run meanwhile, spend most of their time in
# waiting for one another. A small model's training took 17 s of processor time with one, and 48 s with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A fork leaves torch's thread pool behind, and the first to use it afterwards makes it anew. Loader threads of
# transformers would do so all at once, which now and then fails ("Invalid thread pool"): it is made anew here.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

# Files of a minute and more of processor time, longest first: at the end of a run no worker waits long for another.
LONGEST = (
    "engines/test_streaming_compiled.py", "cli/test_independent.py", "demo/test_demo.py", "cli/test_launch.py",
    "cli/test_hosts.py", "cli/test_accelerated.py", "run/test_many_processes.py", "engines/test_zero_roles.py",
    "run/test_estimate.py", "run/test_ladder.py", "run/test_distillation.py", "adapters/test_roles_compiled.py",
    "families/test_weights.py", "run/test_control.py", "run/test_bench.py", "run/test_adapter_kinds.py",
    "run/test_every_family.py", "engines/test_compiling.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # xdist would begin with the files of the most tests, and end with those of a single long one.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))


def process_settings() -> dict[str, Any]:
    """What is set for a whole process, and would follow a test into those after it."""
    cuda = torch.backends.cuda
    found = {
        "torch's default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "flash attention": cuda.flash_sdp_enabled(),
        "memory-efficient attention": cuda.mem_efficient_sdp_enabled(),
        "attention by mathematics": cuda.math_sdp_enabled(),
        "attention by cuDNN": cuda.cudnn_sdp_enabled(),
    }
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    return {**found, "diffusers' attention": dispatch._AttentionBackendRegistry._active_backend} if dispatch else found


@pytest.fixture(autouse=True)
def settings_stay() -> Iterator[None]:
    """A test that changes what is set for the process, and leaves it so, fails itself: not another one, later."""
    before = process_settings()
    yield
    changed = {name: now for name, now in process_settings().items() if before.get(name, now) != now}
    assert not changed, f"left behind: {changed}"


def pytest_collection_finish() -> None:
    # A learner collects garbage before it starts, so tests do so many times over. To look at half a million objects of
    # imported modules, which never become garbage, would take a third of the time of a small run.
    gc.collect()
    gc.freeze()
