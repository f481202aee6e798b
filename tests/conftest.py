"""One thread for each test process: two cores are shared with other work, and threads that wait for each other cost
more than they give on small models."""

import torch

torch.set_num_threads(1)
