"""What weft plan, the memory ladder and weft bench say of a run on conversations."""

import io
import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.small import config_of, make_qwen3
from weft.cli.bench import largest_shape
from weft.cli.plan import print_plan, processes_of
from weft.contracts import Batch
from weft.engines.parallel import Layout
from weft.errors import ConfigError, RunError
from weft.run.bench import bench
from weft.run.bench_work import model_flops
from weft.run.config import RunConfig
from weft.run.estimate import Card
from weft.run.ladder import changed_config, ladder, needed
from weft.run.plan import Plan, plan
from weft.run.questions import Row
from weft.run.rungs import sharded
from weft.run.shortage import explained, naming
from weft.run.train import shape_of

SECRET = "marzipan"
CARD = Card(gpu=True, memory=None)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3, and 30 conversations of which the last two are longer than 128 tokens."""
    root = tmp_path_factory.mktemp("planned")
    make_qwen3(root / "qwen3")
    rows = []
    for number in range(30):
        words = SECRET if number < 28 else " ".join([SECRET] * 40)
        said = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": words}]
        rows.append(json.dumps({"messages": said}))
    (root / "chats.jsonl").write_text("\n".join(rows))
    return root


def text_config(talk: Path, **change: Any) -> RunConfig:
    plain = {
        "name": "run", "output": str(talk / "runs"),
        "family": {"kind": "causal-lm", "source": str(talk / "qwen3")},
        "adapter": {"kind": "lora", "backend": "native", "rank": 4, "targets": "all"},
        "objective": {"kind": "next-token"},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "data": {"kind": "chat", "sources": [{"path": str(talk / "chats.jsonl")}], "length": 128, "batch_size": 2,
                 "cache": "memory"},
        "engine": {"kind": "torch", "device": "cpu", "precision": "fp32"},
        "schedule": {"epochs": 3, "global_batch": 4},
    }  # fmt: skip
    return config_of(plain, **change)


def printed(config: RunConfig, made: Plan) -> str:
    out = io.StringIO()
    print_plan(config, made, Console(file=out, width=160, highlight=False), everything=False)
    return out.getvalue()


def test_a_plan_counts_rows_and_names_what_is_too_long_but_never_what_is_said(talk):
    config = text_config(talk)
    made = plan(config)
    said = printed(config, made)
    assert made.problems == ()
    assert made.shapes == {Row(128): made.survey.rows}
    assert "28 conversations, 2 too long" in said
    assert "chats.jsonl:29" in said and "chats.jsonl:30" in said and "longer than data.length (128): left out" in said
    assert SECRET not in said
    rows, per_step = made.survey.rows, 4
    assert made.steps_per_epoch == ceil(ceil(rows / 2) / (per_step // 2))
    assert made.items == per_step and f"{made.steps} steps of 4 rows = " in said


def test_epochs_and_global_batch_are_planned_over_all_processes(talk):
    """12 rows a step: of 2 a micro-batch each of 3 groups takes 2, whose 2 ranks share each row."""
    config = text_config(talk, parallel={"data": 3, "sequence": 2}, schedule={"global_batch": 12})
    made = plan(config)
    assert made.layout == Layout(3, 1, 2)
    assert made.items == 12
    assert made.steps_per_epoch == ceil(ceil(made.survey.rows / 2) / 6)
    assert "Each of 6 processes (data=3 shard=1 sequence=2)" in printed(config, made)


def test_each_of_64_processes_is_planned_without_starting_one(talk):
    config = text_config(talk, parallel={"shard": 8}, schedule={"global_batch": 128})
    made, alone = plan(config, processes=64), plan(text_config(talk))
    assert made.layout == Layout(8, 8, 1)
    (each,), (one,) = made.memory.values(), alone.memory.values()
    assert each.adapter == one.adapter // 8
    assert each.activations == one.activations


def test_processes_that_cannot_make_the_layout_are_refused_with_those_that_can(talk):
    with pytest.raises(ConfigError, match=r"parallel: .* takes a multiple of 3 processes, but 8 were started"):
        plan(text_config(talk, parallel={"shard": 3}), processes=8)


def test_a_global_batch_that_processes_cannot_share_is_a_problem_of_the_plan(talk):
    made = plan(text_config(talk), processes=3)
    assert len(made.problems) == 1 and "schedule.global_batch: 4 items do not divide by 6" in made.problems[0]


def test_the_number_of_processes_is_asked_for_or_a_launchers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (processes_of(None), processes_of(16)) == (4, 16)
    monkeypatch.delenv("WORLD_SIZE")
    assert processes_of(None) is None
    with pytest.raises(ConfigError, match="--processes: 0"):
        processes_of(0)


def test_rows_that_are_not_packed_are_planned_as_long_as_the_longest_text(talk):
    made = plan(text_config(talk, data={"pack": False}))
    assert list(made.shapes) == [Row(made.survey.longest)]
    assert made.survey.longest < 128


# ---- The ladder -----------------------------------------------------------------------------------------------------


def test_rungs_of_text_chunk_the_losses_first_and_shorten_rows_last(talk, monkeypatch):
    monkeypatch.setattr("weft.math.cross_entropy.LOGITS", 64 * 320)  # of 64 tokens at once, as of a large vocabulary
    config = text_config(talk, family={"kernels": {"cross_entropy": "eager"}}, data={"length": 512})
    rungs = ladder(config, [Row(512)], 1)
    names = [rung.name for rung in rungs]
    assert names[:2] == ["chunked losses", "recompute"]
    assert names[2:] == ["batch", "8-bit optimizer", "fp8 weights", "nf4 weights", "length"]
    assert rungs[2].changes == ("data.batch_size=1",)  # global_batch decides how many make a step
    assert rungs[-1].changes == ("data.length=128",)
    sizes = [rung.bytes for rung in rungs]
    assert sizes == sorted(sizes, reverse=True)
    assert "cache" not in names


@pytest.mark.parametrize("sent", [False, True])
def test_where_there_are_several_gpus_weights_are_spread_over_no_more_than_must_be(talk, monkeypatch, sent):
    """And what an earlier rung has sent to host memory comes back, for it does not go with spread weights."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = text_config(talk, engine={"recompute": True, "offload_inputs": sent}, optimizer={"kind": "adamw8bit"})
    step = sharded(needed(config, Row(128), CARD), 1)
    assert step is not None
    back = {"engine.offload_inputs": False} if sent else {}
    assert step.changes == {"parallel.data": 1, "parallel.shard": 4, **back}
    spread = changed_config(config, step.changes)
    assert spread is not None and spread.parallel.least() == Layout(1, 4, 1)
    spread.engine.check(Layout(1, 4, 1))
    assert "weft train --gpus 4" in step.cost


def test_a_shortage_in_text_names_rows_their_length_and_what_helps(talk):
    batch = Batch({"ids": torch.zeros(2, 128, dtype=torch.long)}, ("a", "b"))
    with pytest.raises(RunError) as caught, explained(text_config(talk)), naming(
        "forward", torch.device("cpu"), shape_of(batch)
    ):  # fmt: skip
        raise torch.OutOfMemoryError("CUDA out of memory.")
    said = str(caught.value)
    assert "out of memory on cpu in forward, 2 rows of 128 tokens" in said
    assert "1. engine.recompute=selective  (" in said


# ---- Speed ----------------------------------------------------------------------------------------------------------


def test_the_flops_of_a_row_are_those_of_its_matrix_products_and_of_attention(talk):
    """By hand, for N tokens. Forward: 2 per weight and token. Backward: as much again for the gradient to the input,
    which frozen layers have too, but for the embedding; adapters have that and their own gradient. The losses' gradient
    to the hidden states takes one product more. Attention: 4 N^2 d forward, twice that backward, for each head."""
    tokens, items = 128, 2
    config = text_config(talk, adapter={"targets": r"model\.layers\.1\.mlp\.down_proj"})
    width, middle, words, rank = 32, 48, config.family.config.vocab_size, 4
    head = 2 * 2 * words * width  # logits, and the gradient to what they were made of
    down = 2 * middle * width
    adapter = 2 * rank * (middle + width)
    attention = 4 * tokens * 32
    layer = 2 * (width * 32 * 2 + 2 * width * 16 + 2 * width * middle) + down + attention
    # Below the adapter nothing has a gradient, and above it stand only the norm and the head.
    expected = items * tokens * (2 * layer + head + 2 * adapter + 2 * rank * width)
    assert model_flops(config, Row(tokens)) == pytest.approx(expected, rel=0.02)


def test_a_bench_of_text_counts_its_tokens(talk):
    config = text_config(talk, data={"length": 32})
    assert largest_shape(config) == Row(32)
    figures = bench(config, Row(32), 2)
    assert figures["case"]["tokens"] == 32 and figures["case"]["accumulate"] == 2
    assert figures["tokens_per_second"] == pytest.approx(2 * 2 * 32 / figures["step_seconds"]["median"])
    assert 0 < figures["mfu"] < 1
    assert figures["memory_bytes"]["planned"] > 0
