"""One thread for each test process and what it starts, for threads that wait for each other cost more than they give on
small models; and what is imported is looked at no more when garbage is collected."""

import gc
import os

import torch

torch.set_num_threads(1)
# Of the programs that tests start: two threads each, beside the tests that run meanwhile, spend most of their time in
# waiting for one another. A small model's training took 17 s of processor time with one, and 48 s with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A fork leaves torch's thread pool behind, and the first to use it afterwards makes it anew. Loader threads of
# transformers would do so all at once, which now and then fails ("Invalid thread pool"): it is made anew here.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def pytest_collection_finish() -> None:
    # A learner collects garbage before it starts, so tests do so many times over. To look at half a million objects of
    # imported modules, which never become garbage, would take a third of the time of a small run.
    gc.collect()
    gc.freeze()
