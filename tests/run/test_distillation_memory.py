"""Student, teacher and critic are one base and two adapters: what a learner holds, counted in storages."""

from collections.abc import Iterable

from torch import Tensor

from weft.config.source import read_text
from weft.run.assemble import assemble
from weft.run.config import parse_config

CONFIG = """\
name: held
family: {kind: wan, source: tiny-wan}
adapter: {kind: lora, rank: 4, targets: attention}
objective: {kind: dmd}
optimizer: {kind: adamw, lr: 1e-4}
data: {kind: prompts, texts: [a red circle rests in the middle], buckets: {sizes: [[64, 64]], frames: [9]}}
engine: {kind: torch, device: cpu}
"""


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the different storages under tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_a_distillation_holds_the_base_once_and_two_adapters():
    config = parse_config(read_text(CONFIG))
    model = assemble(config, config.engine.open()).model
    adapters = {name: list(model.adapters.parameters(name).values()) for name in ("student", "critic")}
    trained = {p.untyped_storage().data_ptr() for own in adapters.values() for p in own}
    everything = [*model.network.parameters(), *model.network.buffers()]
    frozen = [t for t in everything if t.untyped_storage().data_ptr() not in trained]
    base = sum(config.family.weight_bytes("fp32").values())
    assert base <= held(frozen) < 1.01 * base  # beside its weights a network keeps some tables of places
    assert held(everything) - held(frozen) == sum(held(own) for own in adapters.values())
    assert held(adapters["student"]) == held(adapters["critic"]) == 4 * sum(p.numel() for p in adapters["student"])
