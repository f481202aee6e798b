"""Adapters on language models: PEFT reads them, heads may have one, blocks may be recomputed, estimates count them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.families.test_causal_lm import ROWS, relative
from tests.small_text import make_qwen3, packed
from weft.adapters.lora import Lora
from weft.contracts import DEFAULT, UNLEARNED, Adapters, Berth, Model, Tokens
from weft.engines.recompute import recompute
from weft.families.causal_lm import CausalLM
from weft.run.rehearsal import let_be_fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("adapted") / "qwen3")


def adapted(folder: Path, targets: Sequence[str], backend: str = "native", **options: object) -> tuple[Model, Adapters]:
    """A model whose adapter has random values: one with B = 0 would hide half of what may go wrong."""
    family = CausalLM(source=str(folder), **options)  # type: ignore[arg-type]
    network = family.load("fp32", DEFAULT.name, Berth())
    recipe = Lora(backend=backend, rank=4, targets=list(targets))  # type: ignore[arg-type]
    paths = recipe.match(recipe.layers(network), family.targets, family.aliases).paths
    adapters = recipe.attach(network, paths, (DEFAULT.name,), 0)
    adapters.initialize()
    chance = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapters.parameters(DEFAULT.name).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
    return Model(network, family, adapters), adapters


def question(folder: Path) -> Tokens:
    return packed(ROWS, CausalLM(source=str(folder)).config.vocab_size)


def learned(model: Model, adapters: Adapters, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    with adapters.use(DEFAULT.name):
        losses = model.losses(tokens)
        losses.sum().backward()
    found = {}
    for name, parameter in adapters.parameters(DEFAULT.name).items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return losses.detach(), found


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_peft_reads_an_adapter_of_ours_answers_the_same_and_generates(
    folder: Path, tmp_path: Path, backend: str
) -> None:
    """PEFT's keys are its own prefix and the paths of transformers' network."""
    model, adapters = adapted(folder, ["all"], backend)
    tokens, wanted = question(folder), {f"base_model.model.{key}" for key in adapters.state_dict(DEFAULT.name)}
    reference = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
    ).eval()
    names = {name.replace(".default", "") for name, p in reference.named_parameters() if p.requires_grad}
    assert names == wanted
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    ours = adapters.state_dict(DEFAULT.name)
    scale = Lora(rank=4).scale
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                value = ours[name.removeprefix("base_model.model.").replace(".default", "")]
                parameter.copy_(value * scale if "lora_B" in name else value)
        logits = reference(tokens.ids, position_ids=tokens.positions, use_cache=False).logits
        truth = functional.cross_entropy(
            logits.flatten(0, 1), tokens.labels.flatten(), reduction="none", ignore_index=UNLEARNED
        )
        with adapters.use(DEFAULT.name):
            torch.testing.assert_close(model.losses(tokens).flatten(), truth, rtol=1e-5, atol=1e-5)
            options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
            assert isinstance(reference, PeftModel)
            said = model.network.generate(tokens.ids[:1, :4], **options)  # type: ignore[operator]
        assert torch.equal(said, reference.generate(input_ids=tokens.ids[:1, :4], **options))


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_an_adapter_on_the_head_learns_as_it_does_with_all_logits(folder: Path, backend: str) -> None:
    found = [
        learned(*adapted(folder, ["lm_head", "q_proj"], backend, kernels={"cross_entropy": choice}), question(folder))
        for choice in ("chunked", "eager")
    ]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert "lm_head.lora_B.weight" in found[0][1]
    assert all(relative(found[0][1][key], found[1][1][key]) < 1e-5 for key in found[1][1])


def test_recomputed_blocks_learn_the_same(folder: Path) -> None:
    model, adapters = adapted(folder, ["all"])
    losses, grads = learned(model, adapters, question(folder))
    model, adapters = adapted(folder, ["all"])
    for block in model.family.blocks(model.network):
        recompute(block, None, None)
    model.network.train()
    again, same = learned(model, adapters, question(folder))
    assert torch.equal(losses, again)
    assert all(torch.equal(grads[key], same[key]) for key in grads)


def test_weights_may_be_lent_to_a_call(folder: Path) -> None:
    """As meta-learning does with fast weights."""
    model, adapters = adapted(folder, ["all"])
    tokens = question(folder)
    own = {
        name: torch.zeros_like(p) if "lora_B" in name else p
        for name, p in model.network.named_parameters()
        if "lora" in name
    }
    with torch.no_grad(), adapters.use(DEFAULT.name):
        lent = Model(model.network, model.family, adapters, weights=own).losses(tokens)
    with torch.no_grad(), adapters.use(None):
        torch.testing.assert_close(lent, model.losses(tokens), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fake_tensors_answer_as_if_everything_were_learned(folder: Path, attention: str) -> None:
    family = CausalLM(source=str(folder), kernels={"attention": attention})  # type: ignore[arg-type]
    network = family.skeleton("meta")
    paths = [path for path, module in network.named_modules() if path.endswith("q_proj")]
    adapters = Lora(rank=4).attach(network, paths, (DEFAULT.name,), 0)
    with FakeTensorMode():
        let_be_fake(network)
        ids = torch.zeros(2, 16, dtype=torch.long)
        with adapters.use(DEFAULT.name):
            losses = family.forward(network, Tokens(ids, ids, ids))
        assert losses.shape == (2, 16)
        losses.sum().backward()
    assert isinstance(network, nn.Module)
