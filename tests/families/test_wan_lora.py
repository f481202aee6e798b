"""Adapters on every kind of Wan learn as diffusers and PEFT teach them: the same velocity, the same gradients."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close

from weft.adapters.lora import Lora
from weft.adapters.modules import linears_of
from weft.contracts import DEFAULT, Denoise, Model
from weft.families.wan import Wan
from weft.families.weights import HERE

RANK = 4
KINDS = ["t2v", "i2v21", "i2v22", "ti2v"]
LENGTHS = (5, 9)  # of the texts; the shorter is padded in the batch


@pytest.fixture(params=KINDS)
def family(request, wan_folder) -> Wan:
    return Wan(source=str(wan_folder(request.param)))


@pytest.fixture
def question(family) -> Denoise:
    """Two items, texts of two lengths, and for the model that takes it a clean first frame on the second item."""
    torch.manual_seed(2)
    channels = family.geometry().latent_channels
    told = dict(family.conditions(2, 3, 4, 6))
    told["text"] = told["text"][:, : max(LENGTHS)].clone()
    for i, length in enumerate(LENGTHS):
        told["text"][i, length:] = 0
    given = torch.tensor([[False] * 3, [True, False, False]]) if family.image == "frames" else None
    return Denoise(torch.randn(2, channels, 3, 4, 6), torch.tensor([0.8333, 0.02]), told, given)


def asked_plainly(family: Wan, network: nn.Module, question: Denoise) -> Tensor:
    """The same question in diffusers' own words."""
    x, t, cond = question.x, 1000 * question.t, question.cond
    if family.image == "channels":
        mask = (torch.arange(x.shape[2]) == 0).float().view(1, 1, -1, 1, 1).expand(2, 4, *x.shape[2:])
        x = torch.cat([x, mask, cond["image"]], 1)
    if question.given is not None:
        known = question.given[:, :, None, None].expand(2, 3, 2, 3).flatten(1)
        t = torch.where(known, torch.zeros(2, 18), t[:, None].expand(2, 18))
    text = nn.functional.pad(cond["text"], (0, 0, 0, family.tokens_of_text - cond["text"].shape[1]))
    return network(x, t, text, encoder_hidden_states_image=cond.get("clip"), return_dict=False)[0]


def learned_plainly(family: Wan, question: Denoise) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Velocity, adapter weights and their gradients of diffusers' network under PEFT's LoRA."""
    plain = WanTransformer3DModel.from_pretrained(f"{family.source}/transformer").requires_grad_(False)
    network: Any = inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=family.targets["attention+ffn"]), plain
    )
    chance = torch.Generator().manual_seed(0)
    parameters = {name.replace(".default", ""): p for name, p in network.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
    velocity = asked_plainly(family, network, question)
    velocity.square().sum().backward()
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return velocity.detach(), weights, {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_velocity_and_gradients_are_those_of_diffusers_and_peft(family, question, backend):
    velocity, weights, gradients = learned_plainly(family, question)
    recipe = Lora(rank=RANK, alpha=RANK, backend=backend, targets="attention+ffn")
    network = family.load("fp32", DEFAULT.name, HERE)
    report = recipe.match(linears_of(network), family.targets, family.aliases)
    assert len(report.paths) == (12 if family.has_eyes else 10) * 2
    adapters = recipe.attach(network, report.paths, (DEFAULT.name,), 0)
    adapters.load_state_dict(DEFAULT.name, weights)
    with adapters.use(DEFAULT.name):
        ours = Model(network, family, adapters).velocity(question)
        ours.square().sum().backward()
    assert_close(ours.detach(), velocity, rtol=1e-4, atol=1e-5)  # 1000 t is rounded once
    found = adapters.parameters(DEFAULT.name)
    assert found.keys() == gradients.keys()
    for name, parameter in found.items():
        largest = float(gradients[name].abs().max())
        assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_layers_of_a_block_are_found_under_official_and_diffusers_names(family):
    layers = linears_of(family.skeleton())

    def found(*names: str) -> tuple[str, ...]:
        return Lora(rank=RANK, targets=names).match(layers, family.targets, family.aliases).paths

    assert found("q", "k", "v", "ffn.0", "ffn.2") == found("to_q", "to_k", "to_v", "ffn.net.0.proj", "ffn.net.2")
    assert found("q", "k", "v", "o", "ffn.0", "ffn.2", *(["k_img", "v_img"] if family.has_eyes else [])) == found(
        "attention+ffn"
    )
