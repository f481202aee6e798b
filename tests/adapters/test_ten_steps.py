"""Row A7: a run of ten steps with its integrity checked at each."""

import pytest
import torch

from weft.adapters.lora import Lora


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_ten_steps_have_no_zero_loss_no_zero_tensor_and_finite_gradients(backend, tiny_wan, ask, attach):
    network = tiny_wan().to(torch.bfloat16)
    recipe = Lora(rank=4, backend=backend, targets="attention+ffn", lora_plus=4.0, max_norm=10.0)
    adapters = attach(recipe, network)
    weights = adapters.parameters("student")
    groups = [{"params": [p], "lr": 1e-3 * recipe.lr_factor(key)} for key, p in weights.items()]
    optimizer = torch.optim.AdamW(groups)
    base = {key: p.clone() for key, p in network.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(10):
        with adapters.use("student"), torch.autocast("cpu", torch.bfloat16):
            loss = (ask(network).float() - 1).square().mean()
            loss.backward()
        assert torch.isfinite(loss) and loss != 0
        for key, parameter in weights.items():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        optimizer.step()
        optimizer.zero_grad()
        assert adapters.after_step("student")["max_norm/largest"] <= 10.001
        assert all(p.any() and torch.isfinite(p).all() for p in weights.values())
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, base[key]) for key, p in network.named_parameters() if key in base)
