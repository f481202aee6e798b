"""One thread for each test process, for threads that wait for each other cost more than they give on small models; and
what is imported is looked at no more when garbage is collected."""

import gc

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    # A learner collects garbage before it starts, so tests do so many times over. To look at half a million objects of
    # imported modules, which never become garbage, would take a third of the time of a small run.
    gc.collect()
    gc.freeze()
