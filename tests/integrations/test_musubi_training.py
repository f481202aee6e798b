"""weft.integrations.musubi under the calls of musubi-tuner's trainer: ten whole steps, block swap, two experts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

import weft.integrations.musubi as musubi
from tests.families.official_wan import velocity
from tests.integrations.small_wan import SIZES, WanModel, question
from tests.integrations.trainer import PlainNetwork, Run, arguments, train

BACKENDS = pytest.mark.parametrize("backend", ["peft", "native"])


def network_on(transformer: nn.Module, dim: int = 4, alpha: float = 2.0, **kwargs: Any):
    torch.manual_seed(42)
    network = musubi.create_arch_network(1.0, dim, alpha, None, None, transformer, **kwargs)
    network.apply_to(None, transformer, apply_text_encoder=False, apply_unet=True)
    return network


def randomized(network):
    """Every factor random, so that each layer adds something."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return network


def test_the_small_wan_answers_as_the_official_formulas_do():
    transformer, asked = WanModel(), question(0)
    times = asked["t"][:, None].expand(1, 2 * 2 * 2)  # of each token
    expected = velocity(transformer.state_dict(), SIZES, asked["x"], times, asked["context"])
    text = torch.nn.functional.pad(asked["context"], (0, 0, 0, 512 - 5))  # padding is attended to
    torch.testing.assert_close(transformer(asked["x"], asked["t"], text), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("backend", "precision"), [("peft", "no"), ("peft", "bf16"), ("native", "bf16")])
def test_ten_steps_are_whole(backend: str, precision: str):
    transformer = WanModel()
    before = {key: tensor.clone() for key, tensor in transformer.state_dict().items()}

    def look(network, transformer, step: int) -> None:
        for name, parameter in network.named_parameters():
            assert parameter.dtype == torch.float32 and parameter.requires_grad
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if step:
                assert parameter.any() and parameter.grad.any(), f"{name} is zero in step {step}"

    args = arguments(network_args=[f"backend={backend}"], mixed_precision=precision, gradient_checkpointing=True)
    run = train(Run(args, transformer, after_backward=look))
    assert all(0 < loss < 100 for loss in run.losses) and len(set(run.losses)) == 10
    assert all(torch.equal(tensor, before[key]) for key, tensor in transformer.state_dict().items())
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


@pytest.fixture(scope="module")
def plain_lora() -> PlainNetwork:
    """LoRA by its formula, with the first weights that a network of seed 42 draws."""
    first = network_on(WanModel())
    weights = {key: t for key, t in first.state_dict().items() if not key.endswith("alpha")}
    return PlainNetwork(weights, {layer.lora_name: layer.path for layer in first.unet_loras}, scale=2.0 / 4)


@pytest.fixture(scope="module")
def plain(plain_lora: PlainNetwork) -> Run:
    return train(Run(arguments(), WanModel()), steps=3, module=plain_lora)


@BACKENDS
@pytest.mark.parametrize("recomputed", [False, True])
def test_losses_are_those_of_a_plain_lora_with_the_same_first_weights(backend: str, recomputed: bool, plain: Run):
    args = arguments(network_args=[f"backend={backend}"], gradient_checkpointing=recomputed)
    ours = train(Run(args, WanModel()), steps=3)
    torch.testing.assert_close(ours.losses, plain.losses, rtol=2e-6, atol=0)  # fp32 sums in another order
    for key, tensor in plain.network.weights.items():
        learned = ours.network.state_dict()[key.replace("/", ".")]
        # Adam divides by the root of its squares: where a gradient is near zero, its rounding decides the step.
        torch.testing.assert_close(learned, tensor, rtol=0, atol=2e-4)


@BACKENDS
def test_the_same_seed_draws_what_musubis_own_network_draws(backend: str):
    transformer = WanModel()
    network = network_on(transformer, backend=backend)
    after = torch.randn(3)
    torch.manual_seed(42)
    for layer in network.unet_loras:
        base = transformer.get_submodule(layer.path)
        down, _ = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        assert torch.equal(layer.lora_down.weight, down.weight) and not layer.lora_up.weight.any()
    assert torch.equal(after, torch.randn(3))  # so noise and times are the same too


def test_pefts_own_layers_compute_and_no_module_of_the_trainer_holds_them():
    transformer = WanModel()
    network = network_on(transformer)
    inside = [layer.carried[0] for layer in network.unet_loras]
    assert {type(carried) for carried in inside} == {PeftLinear}
    held = {id(module) for root in (network, transformer) for module in root.modules()}
    assert not held & {id(module) for carried in inside for module in carried.modules()}


@BACKENDS
def test_the_trainer_sees_no_change_in_the_transformers_names_or_classes(backend: str):
    bare, transformer = WanModel(), WanModel()
    network_on(transformer, backend=backend)
    assert list(transformer.state_dict()) == list(bare.state_dict())
    assert [(name, type(module)) for name, module in transformer.named_modules()] == [
        (name, type(module)) for name, module in bare.named_modules()
    ]
    assert [name for name, _ in transformer.named_parameters()] == [name for name, _ in bare.named_parameters()]


def swapped(layer: nn.Module) -> list[nn.Module]:
    """musubi's rule for what block swap moves: modules/custom_offloading_utils.py, lines 62-65 and 231-241."""
    return [m for m in layer.modules() if type(m).__name__.endswith("Linear") and m.weight is not None]


def exchange(one: nn.Module, other: nn.Module) -> None:
    """What the device held of one goes away, and its memory holds the other."""
    for leaving, coming in zip(swapped(one), swapped(other), strict=True):
        memory = leaving.weight.data
        leaving.weight.data = memory.clone()
        memory.copy_(coming.weight.data)
        coming.weight.data = memory


def with_block_swap(transformer: WanModel, away: int) -> list[int]:
    """Exchange each of the first blocks with its partner at the tail after its forward, and back after its backward."""
    blocks, moved = list(transformer.blocks), []
    for i in range(away):
        head, tail = blocks[i], blocks[len(blocks) - away + i]

        def forth(module: nn.Module, inputs: object, output: object, head=head, tail=tail) -> None:
            exchange(head, tail)
            moved.append(1)

        def back(module: nn.Module, given: object, received: object, head=head, tail=tail) -> None:
            exchange(tail, head)
            moved.append(-1)

        head.register_forward_hook(forth)
        tail.register_full_backward_hook(back)
    return moved


@BACKENDS
def test_block_swap_takes_the_bases_weights_and_leaves_adapters_alone(backend: str):
    transformer = WanModel()
    args = arguments(network_args=[f"backend={backend}"])
    moved = with_block_swap(transformer, away=1)
    places: dict[str, int] = {}

    def look(network, transformer, step: int) -> None:
        own = {id(parameter) for parameter in network.parameters()}
        taken = {id(module.weight) for module in swapped(transformer)}
        assert len(taken) == 2 * 10 + 6 and not own & taken
        now = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
        assert places.setdefault("all", now) == now

    run = train(Run(args, transformer, after_backward=look), steps=2)
    assert run.losses == train(Run(args, WanModel()), steps=2).losses
    assert moved == [1, -1] * 2


def other_expert(high: WanModel) -> Callable[[WanModel, int], None]:
    """musubi's exchange of experts, wan_train_network.py, lines 604-623, before every step."""
    inactive = [high.state_dict()]

    def turn(transformer: WanModel, step: int) -> None:
        active = transformer.state_dict()
        transformer.load_state_dict(inactive[0], strict=True, assign=True)
        inactive[0] = active

    return turn


@BACKENDS
def test_experts_are_exchanged_by_their_whole_state_and_the_adapter_stays(backend: str, plain_lora: PlainNetwork):
    runs = []
    for module in (musubi, plain_lora):
        low, high = WanModel(seed=0), WanModel(seed=1)
        args = arguments(network_args=[f"backend={backend}"])
        runs.append(train(Run(args, low, before_step=other_expert(high)), steps=3, module=module))
    torch.testing.assert_close(runs[0].losses, runs[1].losses, rtol=2e-6, atol=0)  # sums in another order


@BACKENDS
def test_a_forward_that_was_patched_before_is_kept(backend: str):
    def fp8_linear(self: nn.Linear, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale_weight.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias.to(x.dtype))

    transformer, asked = WanModel(), question(0)
    for layer in transformer.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.register_buffer("scale_weight", layer.weight.abs().max() / 448)
            layer.weight = nn.Parameter(
                (layer.weight / layer.scale_weight).to(torch.float8_e4m3fn), requires_grad=False
            )
            layer.forward = fp8_linear.__get__(layer)
    bare = transformer(**asked)
    network = network_on(transformer, backend=backend)
    assert torch.equal(transformer(**asked), bare)
    randomized(network)
    assert not torch.allclose(transformer(**asked), bare, atol=1e-2)
    network.set_enabled(False)
    assert torch.equal(transformer(**asked), bare)


@BACKENDS
def test_a_bf16_base_is_answered_in_bf16_without_autocast_and_weights_stay_fp32(backend: str):
    transformer = WanModel().bfloat16()
    network = randomized(network_on(transformer, backend=backend))
    linear, x = transformer.blocks[0].ffn[0], torch.randn(2, 3, SIZES.dim, dtype=torch.bfloat16)
    layer = network.unet_loras[8]
    assert layer.path == "blocks.0.ffn.0"
    change = layer.delta(layer.lora_down.weight, layer.lora_up.weight, layer.scale)
    expected = nn.functional.linear(x, linear.weight, linear.bias).float() + x.float() @ change.T
    assert linear(x).dtype == torch.bfloat16
    # One rounding of the sum: half a step of bf16, which has eight digits.
    torch.testing.assert_close(linear(x).float(), expected, rtol=2**-8, atol=1e-5)


@BACKENDS
def test_a_block_compiles_into_one_graph(backend: str):
    transformer = WanModel()
    randomized(network_on(transformer, backend=backend))
    linear, x = transformer.blocks[0].self_attn.q, torch.randn(2, 3, SIZES.dim)
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear(x), rtol=1e-6, atol=1e-6)


@BACKENDS
def test_dropouts_act_in_training_alone_and_keep_the_mean(backend: str):
    transformer = WanModel()
    network = randomized(network_on(transformer, neuron_dropout=0.25, rank_dropout="0.25", backend=backend))
    linear, x = transformer.blocks[0].self_attn.q, torch.randn(1, 1, SIZES.dim).expand(4000, 3, -1)
    quiet = linear(x[:1, :1])
    network.on_epoch_start(transformer)
    thinned = linear(x)
    assert not torch.equal(thinned[0], thinned[1])
    network.eval()
    assert torch.equal(linear(x[:1, :1]), quiet)
    base = nn.functional.linear(x[:1, :1], linear.weight, linear.bias)
    spread = thinned.std((0, 1)) / (4000**0.5)  # tokens of an item share its ranks: 4000 draws
    assert ((thinned.mean((0, 1)) - quiet[0, 0]).abs() < 5 * spread).all() and (quiet - base).abs().min() > 0


def test_a_module_dropped_adds_nothing_to_that_call():
    transformer = WanModel()
    network = randomized(network_on(transformer, module_dropout="0.5")).train()
    linear, x = transformer.blocks[0].self_attn.q, torch.randn(1, 3, SIZES.dim)
    bare = nn.functional.linear(x, linear.weight, linear.bias)
    dropped = [torch.equal(linear(x), bare) for _ in range(60)]
    assert 10 < sum(dropped) < 50 and network.unet_loras[0].training


def test_lora_plus_gives_the_up_factors_a_group_of_their_own():
    network = network_on(WanModel(), loraplus_lr_ratio="4")
    groups, descriptions = network.prepare_optimizer_params(unet_lr=1e-4)
    assert descriptions == ["unet", "unet plus"] and [group["lr"] for group in groups] == [1e-4, 4e-4]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert all(names[id(p)].endswith("lora_up.weight") for p in groups[1]["params"])
    assert len(groups[0]["params"]) == len(groups[1]["params"]) == 20
    assert network.prepare_optimizer_params(unet_lr=0.0) == ([], [])


@BACKENDS
def test_norms_of_the_changes_stay_at_their_limit(backend: str):
    args = arguments(network_args=[f"backend={backend}"], scale_weight_norms=0.01)
    run = train(Run(args, WanModel()), steps=3)
    changes = [layer.scale * (layer.lora_up.weight @ layer.lora_down.weight).norm() for layer in run.network.unet_loras]
    scaled, mean, largest = run.norms[-1]
    assert scaled > 0 and largest == pytest.approx(0.01, rel=1e-4)
    assert max(changes).item() == pytest.approx(0.01, rel=1e-4)
    assert sum(changes).item() / 20 == pytest.approx(mean, rel=1e-4)


def test_a_state_folder_of_accelerate_gives_the_weights_back(tmp_path):
    run = train(Run(arguments(), WanModel()), steps=3)
    run.accelerator.save_state(str(tmp_path))
    kept = {key: tensor.clone() for key, tensor in run.network.state_dict().items()}
    randomized(run.network)
    run.accelerator.load_state(str(tmp_path))
    assert all(torch.equal(tensor, kept[key]) for key, tensor in run.network.state_dict().items())
