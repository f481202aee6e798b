"""The two backends are one: same names, same first values, same answers, same gradients, same trained weights."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from weft.adapters.lora import Lora

BACKENDS = ("native", "peft")
RECIPES = {
    "plain": Lora(rank=4, targets="attention+ffn"),
    "alpha": Lora(rank=4, alpha=2),
    "rslora": Lora(rank=4, alpha=4, rslora=True),  # scale 2
    "dora": Lora(rank=4, alpha=2, dora=True),
    "dora with input dropout": Lora(rank=4, alpha=2, dora=True, input_dropout=0.5),
    "every dropout": Lora(
        rank=4, input_dropout=0.25, activation_dropout=0.5, rank_dropout=0.5, module_dropout=0.25
    ),
}  # fmt: skip


def train(backend, recipe, network, ask, attach, steps):
    adapters = attach(recipe.model_copy(update={"backend": backend}), network)
    optimizer = torch.optim.AdamW(adapters.parameters("student").values(), lr=1e-2)
    losses = []
    torch.manual_seed(5)  # chance of the dropouts
    for _ in range(steps):
        with adapters.use("student"):
            loss = (ask(network) - 1).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return adapters, torch.stack(losses)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_backends_have_the_same_weights_bit_by_bit_after_12_steps(recipe, tiny_wan, ask, attach):
    # Scales that are powers of two: the native backend scales rank activations, PEFT the output.
    results = [train(backend, recipe, tiny_wan(), ask, attach, steps=12) for backend in BACKENDS]
    states = [adapters.state_dict("student") for adapters, _ in results]
    assert list(states[0]) == list(states[1])
    assert torch.equal(results[0][1], results[1][1]) and results[0][1][0] != results[0][1][-1]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_with_an_odd_scale_the_backends_agree_to_rounding(tiny_wan, ask, attach):
    recipe = Lora(rank=5, alpha=3)
    states = [train(b, recipe, tiny_wan(), ask, attach, steps=12)[0].state_dict("student") for b in BACKENDS]
    for key, value in states[0].items():
        # AdamW turns rounding of near-zero gradients into steps: 12 steps of 1e-2, times the last digits.
        assert_close(value, states[1][key], atol=1e-4, rtol=1e-4, msg=key)


@pytest.mark.parametrize("dora", [False, True])
def test_first_values_depend_on_seed_name_and_path_alone(dora, tiny_wan, attach):
    recipe = Lora(rank=4, dora=dora)
    torch.manual_seed(1)
    native = attach(recipe.model_copy(update={"backend": "native"}), tiny_wan(), ("student", "critic"))
    torch.manual_seed(2)
    peft = attach(recipe, tiny_wan(), ("critic", "student"))
    for name in ("student", "critic"):
        ours, theirs = native.state_dict(name), peft.state_dict(name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours) and list(ours) == list(theirs)
    a = "blocks.0.attn1.to_q.lora_A.weight"
    assert not torch.equal(native.state_dict("student")[a], native.state_dict("critic")[a])
    assert not torch.equal(native.state_dict("student")[a], native.state_dict("student")[a.replace("to_q", "to_k")])
    assert native.state_dict("student")[a].abs().max() <= 48**-0.5  # U(-1/sqrt(in), 1/sqrt(in))
    assert not native.state_dict("student")[a.replace("_A", "_B")].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_attaching_leaves_the_runs_own_chance_alone(backend, tiny_wan, attach):
    network = tiny_wan()
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    attach(Lora(rank=4, backend=backend), network)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_on_a_bf16_base_adapters_are_fp32_and_the_backends_answer_alike(dora, autocast, tiny_wan, ask, attach, shaken):
    answers = []
    for backend in BACKENDS:
        network = tiny_wan().to(torch.bfloat16)
        adapters = attach(Lora(rank=4, backend=backend, dora=dora), network)
        shaken(adapters)
        assert {p.dtype for p in adapters.parameters("student").values()} == {torch.float32}
        with adapters.use("student"), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            answers.append(ask(network))
    # PEFT measures DoRA's norm in autocast's bf16, we in fp32: that is 8 bits of mantissa.
    tolerance = 0.05 if dora and autocast else 0
    assert_close(answers[0], answers[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_base_is_untouched_under_none_and_outside_of_use(backend, tiny_wan, ask, attach, shaken):
    network = tiny_wan()
    expected = ask(network)
    adapters = attach(Lora(rank=4, backend=backend), network)
    shaken(adapters)
    assert torch.equal(ask(network), expected)
    with adapters.use("student"):
        assert not torch.equal(ask(network), expected)
        with adapters.use(None):
            assert torch.equal(ask(network), expected)
        assert not torch.equal(ask(network), expected)
    assert torch.equal(ask(network), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_switch_leaves_every_requires_grad_as_it_was(backend, tiny_wan, attach):
    network = tiny_wan()
    adapters = attach(Lora(rank=4, backend=backend), network, ("student", "critic"))
    trainable = {id(p) for name in adapters.names for p in adapters.parameters(name).values()}
    for name in ("student", None, "critic"):
        with adapters.use(name):
            assert {id(p) for p in network.parameters() if p.requires_grad} == trainable
    assert {id(p) for p in network.parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_look_at_the_base_between_forward_and_backward_costs_no_gradient(backend, tiny_wan, ask, attach, shaken):
    network = tiny_wan()
    adapters = attach(Lora(rank=4, backend=backend), network, ("student", "critic"))
    shaken(adapters)
    with adapters.use("student"):
        loss = ask(network).square().sum()
        with adapters.use(None), torch.no_grad():
            ask(network)
        with adapters.use("critic"), torch.no_grad():
            ask(network)
        loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.parameters("student").values())
    assert all(p.grad is None for p in adapters.parameters("critic").values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_names_do_not_mix(backend, tiny_wan, ask, attach, shaken):
    network = tiny_wan()
    both = attach(Lora(rank=4, backend=backend), network, ("student", "critic"))
    shaken(both, "student", seed=1)
    shaken(both, "critic", seed=2)
    for name, seed in (("student", 1), ("critic", 2)):
        lone_network = tiny_wan()
        lone = attach(Lora(rank=4, backend=backend), lone_network, (name,))
        shaken(lone, name, seed=seed)
        with both.use(name), lone.use(name):
            assert torch.equal(ask(network), ask(lone_network))


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_blocks_give_the_same_gradients_dropout_included(backend, tiny_wan, ask, attach, shaken):
    gradients = []
    for recompute in (False, True):
        network = tiny_wan()
        recipe = Lora(rank=4, backend=backend, rank_dropout=0.5, input_dropout=0.2, module_dropout=0.2)
        adapters = attach(recipe, network, ("student", "critic"))
        shaken(adapters)
        network.train()
        if recompute:
            # use_reentrant=False, else the gradients of adapters on a frozen base are silently None.
            network.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=False))
        torch.manual_seed(4)
        with adapters.use("student"):
            ask(network).square().sum().backward()
        gradients.append({key: p.grad for key, p in adapters.parameters("student").items()})
    for key, gradient in gradients[0].items():
        assert gradient is not None and gradients[1][key] is not None, key
        assert torch.equal(gradient, gradients[1][key]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_adapters_follow_the_mode_of_their_network(backend, tiny_wan, ask, attach, shaken):
    network = tiny_wan().eval()
    adapters = attach(Lora(rank=4, backend=backend, activation_dropout=0.5, input_dropout=0.5), network)
    shaken(adapters)
    with adapters.use("student"):
        assert torch.equal(ask(network), ask(network))
        network.train()
        assert not torch.equal(ask(network), ask(network))
