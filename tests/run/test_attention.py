"""Which attention ran is read from the graph of a loss and said once for each shape; a config's choice is followed."""

from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from tests.learners import FixedStream, NoMilestones, batch_of, learner_of, small_config
from tests.small import make_wan
from weft.events import Event, Notice
from weft.families.causal_lm import CausalLM
from weft.families.kernels import Kernels
from weft.families.wan import Wan
from weft.math.sdpa import backend_of
from weft.run.attention import Used, attending, choice_of, kernels_in
from weft.run.train import Course, train


def question() -> torch.Tensor:
    return torch.randn(1, 2, 9, 8, requires_grad=True)


def test_each_call_of_a_fused_kernel_is_found_in_the_graph_recomputed_ones_too() -> None:
    q = question()
    once = scaled_dot_product_attention(q, q, q)
    again = checkpoint(scaled_dot_product_attention, once, q, q, use_reentrant=False)
    assert isinstance(again, torch.Tensor)
    assert kernels_in(once.sum()) == {"cpu-flash": 1}
    assert kernels_in((once + again).sum())["cpu-flash"] >= 1
    with sdpa_kernel(SDPBackend.MATH):
        assert kernels_in(scaled_dot_product_attention(q, q, q).sum()) == {}


def test_a_compiled_block_is_counted_as_one_that_does_not_say() -> None:
    compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager")
    q = question()
    assert kernels_in(compiled(q, q, q).sum()) == {"compiled blocks": 1}


def test_a_run_says_once_for_each_shape_what_ran(tmp_path: Path) -> None:
    config = small_config(tmp_path, make_wan(tmp_path / "model"), schedule={"steps": 4})
    learner, heard = learner_of(config), list[Event]()
    batches = [batch_of(items) for items in (2, 1, 2, 1)]
    with attending(config.family, torch.device("cpu")) as policy:
        course = Course(config.schedule, NoMilestones(), heard.append, noted=Used(heard.append, policy).note)
        train(learner, [FixedStream(batches, 4)], course)
    said = [event.text for event in heard if isinstance(event, Notice)]
    assert [text.partition(":")[0] for text in said] == [
        f"Attention on micro-batches [{items}, 16, 2, 4, 4]" for items in (2, 1)
    ]
    assert all("cpu-flash in 4 calls (a CPU has one fused kernel)" in text for text in said)  # 2 blocks, 2 in each


def test_the_configs_choice_is_followed_while_the_run_is_at_work() -> None:
    q = question()
    with attending(Wan(source="x", attention="math"), torch.device("cpu")):
        assert backend_of(q, q, q) == "math"
    assert backend_of(q, q, q) == "cpu-flash"


def test_what_is_another_librarys_leaves_torchs_attention_to_the_policy() -> None:
    assert choice_of(CausalLM(source="x", kernels=Kernels(attention="flash"))) == "auto"
    assert choice_of(CausalLM(source="x", kernels=Kernels(attention="sdpa"))) == "sdpa"
    assert choice_of(Wan(source="x", attention="cudnn")) == "cudnn"
