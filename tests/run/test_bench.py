"""weft bench: models of released sizes with drawn weights, figures, two depths for a whole, the plain step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import config_of as small_config
from tests.small import make_qwen3, plain_config
from weft.cli.bench import config_of, largest_shape
from weft.engines.graphs import WARM_UP, Graphs, OnHost
from weft.errors import ConfigError, RunError
from weft.families.stored import WeightFiles
from weft.math.flops import H200
from weft.run.assemble import assemble
from weft.run.bench import opened, random_items, stir
from weft.run.bench_cases import SUITES, Case, clip_named, prepared, suite_named
from weft.run.bench_figures import limits
from weft.run.bench_measure import Asked, carried_on, measured_case, of_config, variants_of
from weft.run.bench_models import MODELS, write_model
from weft.run.bench_peers import plain_of
from weft.run.bench_watch import watched
from weft.run.bench_work import closed_work, model_flops
from weft.run.questions import Row

TINY = Case("wan2.1-1.3b", (1, 64, 64), blocks=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The shipped model timed in two variants beside the plain step: one of all for the tests below."""
    config = config_of(None, ["data.batch_size=1", "engine.device=cpu", "engine.precision=fp32"])
    other = config_of(
        None, ["data.batch_size=1", "engine.device=cpu", "engine.precision=fp32", "engine.recompute=true"]
    )
    ready = [(each, largest_shape(each)) for each in (config, other)]
    asked = Asked(2, variants_of("adapter.rank=16; engine.recompute=true"), against=True)
    first, second = of_config(ready, asked)
    return {"first": first, "second": second}


# ---- Drawn weights ------------------------------------------------------------------------------------------------


def test_drawn_weights_are_normal_never_zero_and_the_same_each_time(tmp_path) -> None:
    folder = write_model(tmp_path / "model", "wan2.1-1.3b", 1)
    files = WeightFiles((folder / "transformer" / "diffusion_pytorch_model.drawn",))
    large, again = (files.read("blocks.0.ffn.net.0.proj.weight") for _ in range(2))
    assert large.shape == (8960, 1536) and large.dtype == torch.bfloat16 and torch.equal(large, again)
    assert large.float().std() == pytest.approx(0.02, rel=0.01) and abs(large.float().mean()) < 1e-4
    rows = large[:200].float()
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.15  # rows are cut from one pool, and not alike
    assert files.read("blocks.0.ffn.net.0.proj.bias").count_nonzero() == 0
    assert torch.equal(files.read("blocks.0.attn1.norm_q.weight"), torch.ones(1536, dtype=torch.bfloat16))
    assert files.read("blocks.0.scale_shift_table").float().std() > 0.01
    assert not torch.equal(large[0], files.read("blocks.0.attn1.to_q.weight")[0])


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.2-5b", "wan2.2-a14b", "hunyuan-video", "qwen3-0.6b", "qwen3-8b"])
def test_every_named_model_has_the_size_that_it_is_called_by(name, tmp_path) -> None:
    text = MODELS[name].family == "causal-lm"
    case = Case(name, None if text else (81, 480, 832), 4096 if text else 0, 1024 if text else 0)
    ready = prepared(case, tmp_path)
    numbers = sum(parameter.numel() for parameter in ready.config.family.skeleton().parameters())
    sizes = {"wan2.1-1.3b": 1.42, "wan2.2-5b": 5.0, "hunyuan-video": 12.82, "qwen3-0.6b": 0.596, "qwen3-8b": 8.19}
    assert numbers / 1e9 == pytest.approx(sizes.get(name, 14.29), rel=0.005)
    assert ready.shape.tokens == {"wan2.2-5b": 8190}.get(name, 4096 if text else 32760)
    assert closed_work(ready.config, ready.shape, case.document) is not None


def test_adapters_begin_with_values_everywhere(tmp_path) -> None:
    config = config_of(None, ["engine.device=cpu"])
    learner = assemble(config, config.engine.open())
    stir(learner)
    tensors = learner.model.adapters.state_dict("default")
    assert [name for name, tensor in tensors.items() if not tensor.any()] == []


def test_packed_rows_end_each_conversation_unlearned(tmp_path) -> None:
    config = prepared(Case("qwen3-0.6b", tokens=8, document=4), tmp_path, 1).config
    batch = random_items(config, Row(8), 4)(0)
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert [number for number, label in enumerate(batch["labels"][0].tolist()) if label < 0] == [3, 7]
    assert torch.equal(batch["labels"][0, :3], batch["ids"][0, 1:4]) and batch["ids"].min() >= 0


# ---- FLOP ---------------------------------------------------------------------------------------------------------


PLAIN = ("family.lean=false", "adapter.fused=false")


@pytest.mark.parametrize(
    ("case", "beside"),
    [
        # Lean blocks and fused adapters run x A^T once more in the backward pass, which no formula of a model counts.
        (Case("wan2.1-1.3b", (5, 64, 64), batch=2, changes=PLAIN), 0),
        # Modulation by time, of one token: 6 d d in a stream of a double block, 3 d d in a single one.
        pytest.param(
            Case("hunyuan-video", (1, 64, 64), changes=PLAIN), 2 * (2 * 6 + 2 * 3) * 3072**2, marks=pytest.mark.slow
        ),
        # Counted as if each token saw all others: half of 12 N N d too much.
        (
            Case("qwen3-0.6b", tokens=64, document=64, changes=("family.kernels.layer=eager", PLAIN[1])),
            6 * 64 * 64 * 2048,
        ),
    ],
    ids=lambda value: getattr(value, "model", None),
)
def test_a_further_block_has_the_flop_that_are_counted_on_fake_tensors(case, beside, tmp_path) -> None:
    closed, counted = [], []
    for units in (1, 2):
        ready = prepared(case, tmp_path / str(units), units)
        work = closed_work(ready.config, ready.shape, case.document)
        assert work is not None
        closed.append(work.model)
        counted.append(model_flops(ready.config, ready.shape))
    assert counted[1] - counted[0] == closed[1] - closed[0] + beside


def test_networks_that_no_formula_describes_are_counted(tmp_path) -> None:
    config = config_of(None, ["adapter.kind=lokr", "adapter.factor=4"])
    assert closed_work(config, largest_shape(config)) is None


# ---- Figures ------------------------------------------------------------------------------------------------------


def test_figures_have_all_that_the_document_names(tiny) -> None:
    figures = tiny["first"]
    document = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert [name for name in figures if f"`{name}`" not in document] == []
    assert figures["schema"] == 2 and figures["extrapolated"] is False
    assert figures["attention"] == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert figures["compile"] == {"graphs": 0, "breaks": 0, "seconds": 0.0, "recompiles": 0}
    assert json.loads(json.dumps(figures)) == figures


def test_the_counted_peak_is_near_the_planned_one(tiny) -> None:
    for figures in tiny.values():
        assert figures["memory_bytes"]["by"] == "counted"
        assert figures["memory_bytes"]["ratio"] == pytest.approx(1, abs=0.2)
    assert tiny["second"]["saved_bytes"]["per_block"] < tiny["first"]["saved_bytes"]["per_block"]


def test_variants_take_turns_and_recompute_has_more_flop_to_run(tiny) -> None:
    first, second = tiny["first"], tiny["second"]
    assert first["clock"] == second["clock"] == "processor"
    assert first["flops"]["model"] == second["flops"]["model"]
    assert second["flops"]["hardware"] > first["flops"]["hardware"]
    assert second["case"]["changes"] == ["engine.recompute=true"]


def test_limits_follow_from_seconds(tmp_path) -> None:
    ready = prepared(Case("wan2.1-1.3b", (81, 480, 832)), tmp_path)
    work = closed_work(ready.config, ready.shape)
    assert work is not None
    found = limits(1.55, work.model, work, "none", H200)
    assert found["mfu"] == pytest.approx(0.63, abs=0.005) and found["hfu"] == pytest.approx(0.71, abs=0.005)
    assert found["practical_seconds"] == pytest.approx(1.50, abs=0.005) and found["over_practical"] < 1.04


# ---- Two depths ---------------------------------------------------------------------------------------------------


def depth(number: int, seconds: float) -> dict[str, Any]:
    return {
        "case": {"depth": number}, "step_seconds": {"median": seconds, "steps": 4}, "share": {},
        "phase_seconds": {"forward": seconds / 2}, "tokens_per_second": 10 / seconds, "items_per_second": 1 / seconds,
        "flops": {"model": 100 * number}, "memory_bytes": {"peak": 50 + 10 * number, "planned": 40 + 10 * number,
                                                           "by": "counted"},
        "ceilings": {"products_flops": 1e12, "attention_forward_flops": 1e12, "attention_backward_flops": 1e12,
                     "copy_bytes_per_second": 1e9, "from_host_bytes_per_second": None, "attention_queries": 5},
    }  # fmt: skip


def test_two_depths_carry_on_to_the_whole_in_a_line(tmp_path) -> None:
    ready = prepared(Case("wan2.1-1.3b", (1, 64, 64), blocks=2), tmp_path)
    found = carried_on(depth(2, 3.0), depth(4, 4.0), ready)
    assert found["extrapolated"] is True and found["depths"] == {"2": 3.0, "4": 4.0}
    assert found["step_seconds"]["median"] == 3.0 + 28 * 0.5
    assert found["phase_seconds"]["forward"] == found["step_seconds"]["median"] / 2
    assert found["tokens_per_second"] == pytest.approx(10 / 17)
    assert found["memory_bytes"] == {"peak": 350, "by": "counted", "planned": 340, "ratio": 350 / 340}
    work = closed_work(ready.config, ready.shape)
    assert work is not None and found["flops"]["model"] == work.model


def test_a_longer_network_that_is_not_slower_says_nothing_of_the_whole(tmp_path) -> None:
    ready = prepared(Case("wan2.1-1.3b", (1, 64, 64), blocks=1), tmp_path)
    with pytest.raises(ConfigError, match="nothing follows for the whole"):
        carried_on(depth(1, 4.0), depth(2, 4.0), ready)


# ---- Beside the plain step ----------------------------------------------------------------------------------------


def test_the_plain_step_computes_the_same_loss_and_is_timed_in_turns(tiny) -> None:
    other = tiny["first"]["against"]
    assert other["name"] == "diffusers + PEFT" and "against" not in tiny["second"]
    assert other["loss_first"]["own"] == pytest.approx(other["loss_first"]["theirs"], rel=1e-5)
    assert other["ratio"] > 0 and other["memory_bytes"]["peak"] > 0


def test_the_plain_step_of_a_language_model_computes_the_same_loss(tmp_path) -> None:
    make_qwen3(tmp_path / "model", initializer_range=0.02)
    config = text_config(tmp_path)
    side = opened(config, Row(32), 1, tmp_path / "log", 8)
    plain = plain_of(side)
    plain.meet(side)
    assert side.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)


def test_another_loss_is_no_comparison(tmp_path) -> None:
    make_qwen3(tmp_path / "model", initializer_range=0.02)
    side = opened(text_config(tmp_path), Row(32), 1, tmp_path / "log", 8)
    plain = plain_of(side)
    with torch.no_grad():
        next(plain.model.network.parameters()).mul_(1.5)
    with pytest.raises(RunError, match="loss of the first step"):
        plain.meet(side)


def test_what_the_plain_step_cannot_do_is_refused(tmp_path) -> None:
    config = config_of(None, ["adapter.lora_plus=4", "engine.device=cpu"])
    with pytest.raises(ConfigError, match="learning rates of their own"):
        plain_of(opened(config, largest_shape(config), 1, tmp_path))


# ---- Recorded steps -----------------------------------------------------------------------------------------------


def test_steps_that_are_to_be_recorded_and_cannot_be_are_refused(tmp_path) -> None:
    config = config_of(None, ["engine.graphs=true", "engine.device=cpu"])
    with pytest.raises(ConfigError, match=r"engine\.graphs: .*the device is cpu"):
        opened(config, largest_shape(config), 1, tmp_path)


def test_recorded_steps_are_timed_as_replays_and_looked_at_operator_by_operator(tmp_path) -> None:
    config = config_of(None, ["engine.device=cpu", "engine.precision=fp32", "data.batch_size=1"])
    plain = opened(config, largest_shape(config), 4, tmp_path / "plain")
    other = opened(config, largest_shape(config), 4, tmp_path / "recorded")
    graphs = Graphs(OnHost(), torch.device("cpu"), pytest.fail)
    recorded = replace(other, course=replace(other.course, graphs=graphs))
    for side in (plain, recorded):
        side.go(5)
    assert recorded.losses == plain.losses and plain.replays is None
    assert recorded.replays == 5 - WARM_UP
    seen = [watched(side.learner, side.unrecorded().go, False) for side in (plain, recorded)]
    assert seen[0] == seen[1] and recorded.replays == 5 - WARM_UP


def text_config(root: Path) -> Any:
    plain = plain_config(root, root / "model", root)
    plain["family"] = {"kind": "causal-lm", "source": str(root / "model")}
    plain["adapter"] |= {"targets": "all"}
    plain["objective"] = {"kind": "next-token"}
    plain["data"] = {"kind": "chat", "sources": [{"path": "."}], "length": 32, "batch_size": 2}
    return small_config(plain)


# ---- In words -----------------------------------------------------------------------------------------------------


def test_names_that_are_not_there_are_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'wan2\.1-1\.3b'"):
        write_model(Path("nowhere"), "wan2.1-1.3")
    with pytest.raises(ConfigError, match="Did you mean 'smoke'"):
        suite_named("smok")
    with pytest.raises(ConfigError, match="81x480x832"):
        clip_named("81x480")
    with pytest.raises(ConfigError, match="'recompute' is no change"):
        variants_of("recompute; engine.recompute=true")


def test_clips_that_a_model_cannot_take_and_models_of_another_medium_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"--clip"):
        prepared(Case("wan2.2-5b", (81, 720, 1280)), tmp_path / "a")
    with pytest.raises(ConfigError, match="--clip 81x480x832"):
        prepared(Case("wan2.1-1.3b", tokens=4096), tmp_path / "b")
    with pytest.raises(ConfigError, match="has 30 units of depth"):
        prepared(Case("wan2.1-1.3b", (1, 64, 64)), tmp_path / "c", 31)
    with pytest.raises(ConfigError, match="more than the 30 units"):
        measured_case(Case("wan2.1-1.3b", (1, 64, 64), blocks=16), Asked(1), tmp_path / "d")


def test_too_little_memory_is_said_before_a_weight_is_drawn(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("weft.run.bench_measure.device_memory", lambda config: 1 << 20)
    with pytest.raises(ConfigError, match=r"will take \d+\.\d GiB, and there are 0\.0(.|\n)*--blocks 2"):
        measured_case(Case("tiny-wan", (9, 64, 64)), Asked(1), tmp_path)


def test_suites_name_models_that_are_there() -> None:
    assert {case.model for cases in SUITES.values() for case in cases} <= set(MODELS)
    assert all(len({case.name for case in cases}) == len(cases) for cases in SUITES.values())
