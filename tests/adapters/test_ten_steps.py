"""Row A7: a run of ten steps with its integrity checked at each."""

import pytest
import torch

from tests.adapters.recipes import KINDS
from weft.adapters.lora import Lora
from weft.adapters.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    "native": Lora(rank=4, backend="native", targets="attention+ffn", lora_plus=4.0, max_norm=10.0),
    "peft": Lora(rank=4, backend="peft", targets="attention+ffn", lora_plus=4.0, max_norm=10.0),
    **KINDS,
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_ten_steps_have_no_zero_loss_no_zero_tensor_and_finite_gradients(recipe, tiny_wan, ask, attach):
    network = tiny_wan().to(torch.bfloat16)
    adapters = attach(recipe, network)
    weights = adapters.parameters("student")
    groups = [{"params": [p], "lr": 1e-3 * recipe.lr_factor(key)} for key, p in weights.items()]
    optimizer = torch.optim.AdamW(groups)
    base = {key: p.clone() for key, p in network.named_parameters() if not p.requires_grad}
    fixed = {key: tensor.clone() for key, tensor in adapters.fixed("student").items()}
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
        assert adapters.after_step("student").get("max_norm/largest", 0) <= 10.001
        assert all(p.any() and torch.isfinite(p).all() for p in weights.values())
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, base[key]) for key, p in network.named_parameters() if key in base)
    assert all(torch.equal(tensor, fixed[key]) for key, tensor in adapters.fixed("student").items())
