"""What sharded and replicated engines do with odd tensors, two roles, two experts, overflows and host memory."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from tests.engines.equality import BOUND, Case, distance, learner_of, shake, taught
from tests.learners import batch_of, parts, small_config
from tests.multi import spawn
from tests.small import make_wan
from weft.contracts import Model
from weft.engines.parallel import Parallel
from weft.engines.torch_engine import Torch
from weft.run.assemble import target_report
from weft.run.learner import Learner

WIDTH, WORDS = 6, 5
ROLES = ("teacher", "student")


class Tied(nn.Module):
    """Embeds words, and scores them with the same matrix; a trained shift stands for an adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("offset", torch.arange(WORDS).float())
        self.gain = torch.ones(WIDTH)
        self.requires_grad_(False)
        self.block.register_parameter("shift", nn.Parameter(torch.linspace(-1, 1, WIDTH)))
        self.block.register_forward_hook(lambda block, _, output: output + block.shift)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.block(self.embedding(words))) * self.gain) * self.temperature + self.offset


def berthed(network: nn.Module, put: Callable[[Tensor, int | None, int], Tensor]) -> nn.Module:
    """The network as a family leaves it: each frozen tensor put into its berth, a shared one once."""
    put_once: dict[int, Tensor] = {}
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.requires_grad:
                    continue
                if id(tensor) not in put_once:
                    there = put(tensor.data, None, 1)
                    put_once[id(tensor)] = nn.Parameter(there, False) if tensors is module._parameters else there
                tensors[name] = put_once[id(tensor)]
    return network


def odd_tensors(parallel: dict[str, Any]) -> tuple[Any, ...]:
    engine = Torch(device="cpu").open(Parallel(**parallel))
    network = berthed(Tied(), engine.berth(0).put)
    engine.place(network, [network.block])
    words = torch.arange(WORDS)
    output = network(words)
    engine.backward(output.square().sum(), last=True)
    gradient = whole(network.block.shift.grad)
    optimizer = torch.optim.SGD([network.block.shift], lr=0.1)
    stepped = engine.step(optimizer, max_norm=1.0)
    shift = network.block.shift.detach()
    sharded = isinstance(shift, DTensor)
    facts = {
        "tied": network.head.weight is network.embedding.weight,
        "buffer": torch.equal(network.offset, torch.arange(WORDS).float()),
        "rows": len(network.embedding.weight.to_local()) if sharded else WORDS,
    }
    return facts, output.detach(), (gradient, whole(shift)), float(stepped.norm), network(words).detach()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def overflow(parallel: dict[str, Any]) -> tuple[Any, ...]:
    """The gradient of the last number alone is infinite, which one process holds; the next step is a good one."""
    engine = Torch(device="cpu", precision="fp16").open(Parallel(**parallel))
    network = berthed(Tied(), engine.berth(0).put)
    engine.place(network, [])
    optimizer, found = torch.optim.SGD([network.block.shift], lr=0.1), []
    for gain in (1e36, 1.0):  # times the scale of 2^16 that is more than fp32 holds
        network.gain[-1] = gain
        engine.backward(network(torch.zeros(1, dtype=torch.long)).sum(), last=True)
        stepped = engine.step(optimizer, max_norm=0.0)
        moved = bool(stepped.moved)
        found.append((moved, stepped.scaled and not moved, engine.scaler.get_scale()))
    return tuple(found)


def missing() -> tuple[Any, ...]:
    """One parameter is used by rank 1 alone, one by nobody."""
    engine = Torch(device="cpu").open(Parallel())
    both, one, none = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    loss = (both * (1.0 + engine.rank)).sum() + (one.sum() if engine.rank == 1 else 0)
    engine.backward(loss, last=True)
    optimizer = torch.optim.AdamW([both, one, none], lr=1.0, weight_decay=0.5)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() if p.grad is not None else None for p in (both, one, none))
    )
    norm = engine.step(optimizer, max_norm=0.0).norm
    return seen, norm, none.detach()


def two_roles(model: Path, backend: str, parallel: dict[str, Any]) -> dict[str, Tensor]:
    """Two adapters on one base that learn in turns, each while the other rests."""
    config = small_config(model.parent, model, adapter={"backend": backend}, engine={"recompute": True})
    engine, family = config.engine.open(Parallel(**parallel)), config.family
    network = family.load(engine.precision, "default", engine.berth(0))
    adapters = config.adapter.attach(network, target_report(config, network).paths, ROLES, config.seed)
    engine.place(network, family.blocks(network)).train()
    adapters.initialize()
    learner = Learner(Model(network, family, adapters), None, None, engine, {}, 0, None)  # type: ignore[arg-type]
    optimizers = {}
    for role in ROLES:
        shake(learner, role)
        optimizers[role] = torch.optim.AdamW(adapters.parameters(role).values(), lr=1e-3)
    for step in range(4):
        role = ROLES[step % 2]
        taught(learner, parts(batch_of(4, seed=step), 1, 1, 1, 1), role)
        resting = [p for p in adapters.parameters(ROLES[1 - step % 2]).values() if p.grad is not None]
        assert not resting, "a role that rests has a gradient"
        engine.step(optimizers[role], 0.05)
    return {f"{role} {key}": t.clone() for role in ROLES for key, t in adapters.state_dict(role).items()}


def two_experts(model: Path, parallel: dict[str, Any]) -> dict[str, Tensor]:
    """Two networks with an adapter each, asked in turns."""
    learner = learner_of(model, Case(parallel, {"recompute": True}, {"expert": "both"}))
    for step in range(4):
        expert = ("high", "low")[step % 2]
        batches = parts(batch_of(2, seed=step), 1, 1)
        taught(learner, batches, expert, expert)
        learner.engine.step(learner.optimizers[expert], 0.05)
    return {
        f"{name} {k}": t.clone() for name in ("high", "low") for k, t in learner.model.adapters.state_dict(name).items()
    }


def everything(models: dict[str, Path], parallel: dict[str, Any]) -> dict[str, Any]:
    return {
        "odd": odd_tensors(parallel),
        "overflow": overflow(parallel),
        "missing": missing() if parallel == {} and os.environ["WORLD_SIZE"] == "2" else None,
        **{f"roles {backend}": two_roles(models["t2v"], backend, parallel) for backend in ("native", "peft")},
        "experts": two_experts(models["experts"], parallel),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    return {"t2v": model, "experts": make_wan(tmp_path_factory.mktemp("two") / "model", kind="experts")}


@pytest.fixture(scope="module")
def alone(models) -> dict[str, Any]:
    return spawn(1, everything, models, {})[0]


@pytest.fixture(scope="module")
def sharded(models) -> list[dict[str, Any]]:
    return spawn(2, everything, models, {"shard": 2})


@pytest.fixture(scope="module")
def replicated(models) -> list[dict[str, Any]]:
    return spawn(2, everything, models, {})


def test_tied_weights_buffers_and_single_numbers_survive_sharding(alone, sharded):
    """5 rows over 2 processes: 3 and 2. Two processes that see the same have twice the gradient of one."""
    _, output, (gradient, _), norm, _ = alone["odd"]
    for rank, said in enumerate(sharded):
        facts, out, (own, shift), length, again = said["odd"]
        assert facts == {"tied": True, "buffer": True, "rows": (3, 2)[rank]}
        assert_close(out, output)
        assert_close(own, 2 * gradient)
        assert length == pytest.approx(2 * norm, rel=1e-6)
        # Cut to length 1, both go the same way.
        assert_close(shift, alone["odd"][2][1])
        assert_close(again, alone["odd"][4])


@pytest.mark.parametrize("engine", ["sharded", "replicated"])
def test_an_overflow_in_one_process_skips_the_step_in_all_and_lowers_their_scale_alike(request, engine):
    for said in request.getfixturevalue(engine):
        (moved, overflowed, lowered), (again, not_again, kept) = said["overflow"]
        assert (moved, overflowed) == (False, True)
        assert (again, not_again) == (True, False)
        assert lowered == kept == 2.0**15


def test_a_parameter_that_one_process_did_not_use_counts_there_as_zeros_and_one_that_nobody_used_stays(replicated):
    for said in replicated:
        (both, one, none), norm, unmoved = said["missing"]
        assert both.tolist() == [1 + 2, 1 + 2]
        assert one.tolist() == [1, 1]
        assert none is None and unmoved.tolist() == [0, 0]
        assert norm == pytest.approx((9 + 9 + 1 + 1) ** 0.5)


@pytest.mark.parametrize("engine", ["sharded", "replicated"])
@pytest.mark.parametrize("what", ["roles native", "roles peft", "experts"])
def test_roles_and_experts_that_learn_in_turns_learn_what_they_learn_in_one_process(request, alone, engine, what):
    first, second = request.getfixturevalue(engine)
    assert distance(first[what], alone[what]) < BOUND
    assert all(torch.equal(second[what][key], tensor) for key, tensor in first[what].items())


# ---- Host memory ----------------------------------------------------------------------------------------------------

LAYERS, HIDDEN = 8, 384


def make_large(folder: Path) -> Path:
    """A Wan of 50 MB, of which no tensor has more than 2.4 MB."""
    from diffusers import WanTransformer3DModel

    made = make_wan(folder)
    WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=HIDDEN // 3, text_dim=128, freq_dim=32, ffn_dim=4 * HIDDEN,
        num_layers=LAYERS, cross_attn_norm=True, in_channels=16, out_channels=16,
    ).save_pretrained(made / "transformer")  # fmt: skip
    return made


def host_memory(small: Path, large: Path, parallel: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the large model's weights, and by how much a process's memory grew at most while it read and placed
    them; the small one has brought in the code."""
    engine = Torch(device="cpu").open(Parallel(**parallel))
    for model in (small, large):
        family = small_config(model.parent, model).family
        engine.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark of resident memory begins anew
        before = memory("VmRSS")
        network = family.load(engine.precision, "default", engine.berth(0))
        engine.place(network, family.blocks(network))
        grown = memory("VmHWM") - before
    return sum(family.weight_bytes(engine.precision).values()), grown


def memory(name: str) -> int:
    """Bytes, as Linux counts them for this process."""
    status = Path("/proc/self/status").read_text().split("\n")
    return next(1024 * int(line.split()[1]) for line in status if line.startswith(f"{name}:"))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells the peak of a stretch")
def test_no_process_ever_holds_more_than_its_share_of_the_weights_and_a_few_tensors(model, tmp_path):
    """A quarter; the largest tensor as it is read, cut and padded; and 5 MB for Python and the allocator."""
    large = make_large(tmp_path / "model")
    ((weights, grown),) = spawn(1, host_memory, model, large, {})
    assert grown > 0.95 * weights > 45e6
    largest = 4 * 4 * HIDDEN * HIDDEN
    found = spawn(4, host_memory, model, large, {"shard": 4})
    print(weights, grown, largest, found)
    assert max(grown for _, grown in found) < weights / 4 + 3 * largest + 5e6
