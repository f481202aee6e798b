"""What a step of a language model will need, against what real small ones hold, and what each of several ranks has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.learners import learner_of
from tests.multi import spawn
from tests.run.memory import allocated_at_peak, question_of, ready, really_held, really_kept
from tests.small import config_of, make_qwen3
from tests.small_text import make_text
from weft.contracts import Engine, Tokens
from weft.engines.parallel import Layout
from weft.errors import ConfigError
from weft.run.assemble import assemble
from weft.run.config import RunConfig
from weft.run.estimate import Card, Held, activations, composed, equal_blocks, estimate, held
from weft.run.layouts import check_layout
from weft.run.questions import Row, answered
from weft.run.rehearsal import LiveBytes
from weft.run.shares import adapter_bytes, sharded, weights_of

ROW = Row(96)
RECOMPUTE = {"recompute": True}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("estimated") / "qwen3")


def text_config(root: Path, model: Path, **change: Any) -> RunConfig:
    """A run's config whose conversations are never looked for."""
    plain = {
        "name": "run", "output": str(root / "runs"), "seed": 5,
        "family": {"kind": "causal-lm", "source": str(model)},
        "adapter": {"kind": "lora", "backend": "native", "rank": 4, "targets": "all"},
        "objective": {"kind": "next-token"},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "data": {"kind": "chat", "sources": [{"path": str(root / "no chats.jsonl")}], "length": 96, "batch_size": 2},
        "engine": {"kind": "torch", "device": "cpu", "precision": "fp32"},
    }  # fmt: skip
    return config_of(plain, **change)


# ---- Activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "engine"), [
    ("native", {}), ("peft", {}), ("native", RECOMPUTE), ("peft", RECOMPUTE), ("native", {"precision": "bf16"}),
    ("peft", {"precision": "bf16", **RECOMPUTE}),
])  # fmt: skip
def test_a_rehearsal_on_fake_tokens_holds_what_a_real_step_of_packed_rows_holds(qwen, tmp_path, backend, engine):
    config = text_config(tmp_path, qwen, engine=engine, adapter={"backend": backend})
    kept, peak = really_held(config, ROW)
    found = held(config, ROW)
    assert found.kept == pytest.approx(kept, rel=0.05)
    assert found.peak == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_what_is_held_after_the_forward_pass_is_what_autograd_keeps(qwen, tmp_path, backend):
    config = text_config(tmp_path, qwen, adapter={"backend": backend})
    assert held(config, ROW).kept == pytest.approx(really_kept(config, ROW), rel=0.1)


@pytest.mark.parametrize("engine", [{}, RECOMPUTE])
def test_the_peak_of_a_rehearsal_is_the_peak_of_the_allocator(qwen, tmp_path, engine):
    """An operator's own scratch memory is seen by the allocator alone."""
    config = text_config(tmp_path, qwen, engine=engine)
    assert activations(config, ROW) == pytest.approx(allocated_at_peak(config, ROW), rel=0.1)


@pytest.mark.parametrize("kernels", [{"cross_entropy": "eager"}, {"rms_norm": "eager", "mlp": "eager"}])
def test_kernels_are_rehearsed_as_they_are_chosen(qwen, tmp_path, kernels):
    config = text_config(tmp_path, qwen, family={"kernels": kernels})
    kept, peak = really_held(config, ROW)
    found = held(config, ROW)
    assert (found.kept, found.peak) == pytest.approx((kept, peak), rel=0.05)


def test_an_attention_that_is_told_where_conversations_begin_has_no_mask_of_all_pairs(qwen, tmp_path):
    """A mask of one byte for each pair of tokens, which sdpa keeps for the backward pass."""
    masked, flex = (text_config(tmp_path, qwen, family={"kernels": {"attention": kind}}) for kind in ("sdpa", "flex"))
    long = Row(512)
    assert held(masked, long).kept - held(flex, long).kept >= 2 * 512 * 512


def test_a_run_in_which_fewer_tokens_are_learned_needs_no_more_than_the_plan_says(qwen, tmp_path):
    config = text_config(tmp_path, qwen)
    learner, _ = ready(config, ROW)
    whole = question_of(learner, config, ROW)
    assert isinstance(whole, Tokens)
    labels = torch.where(torch.arange(96) % 3 == 0, whole.labels, -100)
    with learner.model.adapters.use(learner.shown[0]), LiveBytes() as live:
        answered(learner.model, Tokens(whole.ids, whole.positions, labels)).backward()
    assert live.peak < held(config, ROW).peak


def test_a_deep_decoder_is_rehearsed_in_short(tmp_path):
    config = text_config(tmp_path, make_qwen3(tmp_path / "deep", layers=6))
    kept, peak = really_held(config, ROW)
    found = held(config, ROW)
    assert equal_blocks(config) == 6
    assert (found.kept, found.peak) == pytest.approx((kept, peak), rel=0.02)


def large_qwen3(folder: Path) -> Path:
    """Qwen3-0.6B as its makers' config has it: 28 layers of width 1024, 16 heads of 128 and 8 of keys, 151936 words.
    The weights are zeros that take no room on the disk."""
    make_text(folder, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960,
        "layer_types": ["full_attention"] * 28, "max_window_layers": 28,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    from weft.families.causal_lm import CausalLM

    shapes = dict(CausalLM(source=str(folder)).skeleton().named_parameters())
    header, offset = {}, 0
    for name, tensor in shapes.items():
        end = offset + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert len(opened.keys()) == len(shapes)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_qwen3(tmp_path_factory.mktemp("large") / "qwen3-0.6b")


def test_the_0_6b_model_is_planned_by_its_headers_alone(large, tmp_path):
    """596,049,920 parameters in bf16, and two tables of 64 rotary frequencies in fp32."""
    config = text_config(tmp_path, large, engine={"precision": "bf16", **RECOMPUTE}, data={"batch_size": 1})
    found = estimate(config, [Row(2048)], {"default": 1000}, Card(gpu=True, memory=None))[Row(2048)]
    assert found.weights == 2 * 596_049_920 + 2 * 64 * 4
    inputs = 28 * 2048 * 1024 * 2  # what recomputation keeps of each block
    logits = 883 * 151_936 * 4  # of so many tokens at once: 2^27 // 151936
    assert inputs + 2 * logits < found.activations < 2 * inputs + 6 * logits


# ---- Several processes ----------------------------------------------------------------------------------------------

BLOCKS: dict[int | None, int] = {None: 70, 0: 100, 1: 100, 2: 120}
ALL = sum(BLOCKS.values())


def test_sharded_weights_are_a_part_of_all_and_whole_what_is_computed_with_and_what_comes_next():
    assert sharded(BLOCKS, experts=1, processes=10) == ALL // 10 + 70 + 2 * 120
    assert sharded(BLOCKS, experts=2, processes=10) == 2 * ALL // 10 + 70 + 2 * 120


def test_replicas_have_all_weights_and_shards_part_moments_too(qwen, tmp_path):
    config = text_config(tmp_path, qwen)
    assert weights_of(config, BLOCKS, None, Layout(data=8)) == (ALL, 0)
    assert weights_of(config, BLOCKS, None, Layout(data=2, shard=5, sequence=2)) == (ALL // 10 + 310, 0)
    assert adapter_bytes(config, {"default": 1000}, Layout(data=8)) == (16_000, 0)
    assert adapter_bytes(config, {"default": 1000}, Layout(data=2, shard=4, sequence=2)) == (2_000, 0)


def test_zero_2_spreads_moments_and_zero_3_weights_too(qwen, tmp_path):
    """Weights and gradients of 8 bytes stay; fp32 copy, summed gradient and two moments are 16 bytes of a part."""
    two, three, away = (
        text_config(tmp_path, qwen, engine={"kind": "deepspeed", **change})
        for change in ({"zero": 2}, {"zero": 3}, {"zero": 3, "offload_optimizer": True, "offload_parameters": True})
    )
    layout = Layout(data=8)
    assert adapter_bytes(two, {"default": 1000}, layout) == (8_000 + 2_000, 0)
    assert adapter_bytes(away, {"default": 1000}, layout) == (8_000, 2_000)
    assert weights_of(two, BLOCKS, None, layout) == (ALL, 0)
    assert weights_of(three, BLOCKS, None, layout) == (-(-ALL // 8) + ALL, 0)  # a model so small is used again at once
    assert weights_of(away, BLOCKS, None, layout) == (ALL, -(-ALL // 8))


def part_of_sequence(folder: str, root: str, method: str) -> tuple[int, int]:
    """What a rank of two holds of a real step, after its forward pass and at its peak."""
    config = text_config(Path(root), Path(folder), parallel={"sequence": 2, "sequence_method": method})
    engine = config.engine.open(config.parallel)
    try:
        return held_by(config, engine)
    finally:
        engine.close()


def held_by(config: RunConfig, engine: Engine) -> tuple[int, int]:
    learner = assemble(config, engine)
    asked = question_of(learner, config, ROW)
    for parameter in learner.model.adapters.parameters(learner.shown[0]).values():
        parameter.grad = torch.zeros_like(parameter)
    with learner.model.adapters.use(learner.shown[0]), LiveBytes() as live:
        loss = answered(learner.model, asked)
        kept = live.now
        loss.backward()
    return kept, live.peak


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_one_of_two_ranks_that_part_the_tokens_holds_what_its_rehearsal_holds(qwen, tmp_path, method):
    config = text_config(tmp_path, qwen, parallel={"sequence": 2, "sequence_method": method})
    found = held(config, ROW, sequence=2)
    for kept, peak in spawn(2, part_of_sequence, str(qwen), str(tmp_path), method):
        assert found.kept == pytest.approx(kept, rel=0.1)
        assert found.peak == pytest.approx(peak, rel=0.1)


def shard_bytes(folder: str, root: str) -> tuple[int, int]:
    """Bytes of a rank's own weights, and of its adapter's."""
    config = text_config(Path(root), Path(folder), parallel={"shard": 2})
    engine = config.engine.open(config.parallel)
    try:
        network = assemble(config, engine).model.network
        parts = {id(p): p for p in network.parameters()}.values()
        sizes = [0, 0]
        for parameter in parts:
            own: Any = parameter
            sizes[parameter.requires_grad] += own.to_local().nbytes
        return sizes[0], sizes[1]
    finally:
        engine.close()


def test_what_a_rank_of_fsdp_keeps_between_steps_is_its_planned_part(qwen, tmp_path):
    config = text_config(tmp_path, qwen)
    by_block = config.family.weight_bytes("fp32")
    trainable = sum(p.numel() for p in learner_of(config).model.adapters.parameters("default").values())
    frozen, trained = spawn(2, shard_bytes, str(qwen), str(tmp_path))[0]
    whole = by_block[None] + 2 * max(size for block, size in by_block.items() if block is not None)
    planned, _ = weights_of(config, by_block, None, Layout(shard=2))
    assert frozen == pytest.approx(planned - whole, rel=0.02)
    assert trained == pytest.approx(4 * trainable / 2, rel=0.02)


def test_a_layout_changes_each_part_of_an_estimate_as_it_should(qwen, tmp_path):
    config, card = text_config(tmp_path, qwen), Card(gpu=True, memory=None)
    one, many = (
        composed(config, Held(0, 10**6), {"default": 16_000}, card, layout)
        for layout in (Layout(), Layout(data=4, shard=8))
    )
    assert many.adapter == one.adapter // 8
    assert many.activations == one.activations
    assert many.fixed == one.fixed > 0


@pytest.mark.parametrize(("change", "layout", "refusal"), [
    ({"engine": {"kind": "deepspeed"}}, Layout(shard=2), r"parallel\.shard: 2 is not for engine\.kind 'deepspeed'"),
    ({"engine": {"recompute": True, "stream_blocks": 1}}, Layout(shard=2), r"engine\.stream_blocks: not with parallel"),
    ({"engine": {"device": "cuda:99"}}, Layout(), r"engine\.device: 'cuda:99'"),
])  # fmt: skip
def test_what_many_processes_may_not_do_is_refused_before_one_is_started(qwen, tmp_path, change, layout, refusal):
    with pytest.raises(ConfigError, match=refusal):
        check_layout(text_config(tmp_path, qwen, **change), layout)
