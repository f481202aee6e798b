"""What a step will need, by arithmetic and against what autograd really keeps on a small network."""

import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.learners import learner_of, small_config
from tests.small import WIDTH, make_wan
from weft.contracts import Denoise
from weft.data.buckets import Bucket
from weft.objectives.flow_matching import ROLE
from weft.run.config import RunConfig
from weft.run.estimate import activations, estimate
from weft.run.learner import Learner

SMALL = Bucket(frames=9, height=64, width=96, tokens=3 * 4 * 6)


@dataclass
class Storages:
    """Memory that autograd keeps beside the weights, each piece once; the references hold it at its address."""

    base: set[int]
    held: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.base:
            self.held.setdefault(storage.data_ptr(), storage)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.held.values())


def really_kept(config: RunConfig, bucket: Bucket) -> int:
    """Bytes that a real forward pass of the objective's question leaves for its backward pass."""
    learner = learner_of(config)
    network = learner.model.network
    kept = Storages({p.untyped_storage().data_ptr() for p in [*network.parameters(), *network.buffers()]})
    question = question_of(learner, config, bucket)
    with learner.model.adapters.use(ROLE), saved_tensors_hooks(kept.pack, lambda t: t):
        with learner.engine.computing():
            velocity = learner.model.velocity(question)
        velocity.float().square().sum()
    return kept.bytes


def question_of(learner: Learner, config: RunConfig, bucket: Bucket) -> Denoise:
    family, items = learner.model.family, config.data.batch_size
    shape = family.geometry().latent_shape(bucket.frames, bucket.height, bucket.width)
    return Denoise(torch.randn(items, *shape), torch.rand(items), family.conditions(items))


# In bf16 the rehearsal also has the conditioning embedder in bf16, which the real one keeps in fp32.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.01), ("bf16", 0.05)])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_a_rehearsal_counts_is_what_autograd_keeps(world, tmp_path, precision, tolerance, batch_size):
    config = small_config(tmp_path, world / "model", engine={"precision": precision}, data={"batch_size": batch_size})
    assert activations(config, SMALL) == pytest.approx(really_kept(config, SMALL), rel=tolerance)


def test_what_is_kept_grows_with_the_batch(world, tmp_path):
    one, three = (small_config(tmp_path, world / "model", data={"batch_size": items}) for items in (1, 3))
    assert activations(three, SMALL) == pytest.approx(3 * activations(one, SMALL), rel=0.1)  # rotary tables are shared


def test_recomputation_keeps_the_blocks_inputs_and_one_block_at_a_time(world, tmp_path):
    """Outside of the blocks it is what the real recomputing network keeps; to that comes one block of the two."""
    whole = small_config(tmp_path, world / "model")
    recomputed = small_config(tmp_path, world / "model", engine={"recompute": True})
    outside = really_kept(recomputed, SMALL)
    block = (really_kept(whole, SMALL) - outside) / 2
    assert activations(recomputed, SMALL) == pytest.approx(outside + block, rel=0.05)


def test_each_further_block_costs_a_recomputing_run_its_input_alone(world, tmp_path):
    """72 tokens of width 24 in fp32 for each of 2 items, as the real network keeps it."""
    deep = make_wan(tmp_path / "deep", layers=5)
    two, five = (small_config(tmp_path, m, engine={"recompute": True}) for m in (world / "model", deep))
    inputs = 3 * 2 * SMALL.tokens * WIDTH * 4
    assert activations(five, SMALL) - activations(two, SMALL) == inputs
    assert really_kept(five, SMALL) - really_kept(two, SMALL) == inputs


def test_the_adapter_costs_its_weights_gradients_moments_and_average_in_fp32(world, tmp_path):
    plain = small_config(tmp_path, world / "model")
    averaged = small_config(tmp_path, world / "model", ema={"decay": 0.9})
    small = small_config(tmp_path, world / "model", optimizer={"kind": "adamw8bit", "lr": 1e-4})
    costs = [estimate(config, [SMALL], trainable=1000)[SMALL].adapter for config in (plain, averaged, small)]
    assert costs == [1000 * (4 + 4 + 8), 1000 * (4 + 4 + 8 + 4), 1000 * (4 + 4 + 2)]


def test_weights_count_two_bytes_in_bf16_and_four_in_fp32(world, tmp_path):
    network = WanTransformer3DModel.from_pretrained(world / "model" / "transformer")
    numbers = sum(p.numel() for p in network.parameters())
    for precision, size in (("fp32", 4), ("bf16", 2)):
        config = small_config(tmp_path, world / "model", engine={"precision": precision})
        assert estimate(config, [SMALL], 0)[SMALL].weights == size * numbers


def test_the_1_3b_model_at_81_frames_of_480p_is_rehearsed_in_seconds_without_its_memory(world, tmp_path):
    """Real, it would take 2.8 GB of weights and tens of GB of activations."""
    folder = Path(tmp_path / "wan-1.3b")
    with torch.device("meta"):
        network = WanTransformer3DModel(num_layers=30, num_attention_heads=12, ffn_dim=8960)
    network.save_config(folder / "transformer")
    for part in ("vae", "tokenizer"):
        (folder / part).symlink_to(world / "model" / part)
    bucket = Bucket(frames=81, height=480, width=832, tokens=32_760)
    change = {"data": {"batch_size": 1}, "family": {"text_length": 512}, "adapter": {"rank": 32}}
    config = small_config(tmp_path, folder, engine={"precision": "bf16", "recompute": True}, **change)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = estimate(config, [bucket], trainable=43_745_280)[bucket]
    assert time.process_time() - began < 30
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30
    assert found.weights == pytest.approx(2 * 1.42e9, rel=0.01)
    inputs = 30 * 32_760 * 1536 * 2  # bytes: what recomputation keeps of each block in bf16
    assert inputs < found.activations < 4 * inputs
    assert found.total == found.weights + found.adapter + found.activations + found.fixed
