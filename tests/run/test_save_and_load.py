"""Save and load under FSDP2 on four processes that torchrun starts: a two-layer Qwen3 that never is whole anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import make_qwen3

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_tensor_is_loaded_to_the_bit_and_the_next_losses_are_those_of_the_first_run(tmp_path) -> None:
    model = make_qwen3(tmp_path / "model", layers=2)
    chats = [[{"role": "user", "content": f"count to {n}"},
              {"role": "assistant", "content": " ".join(map(str, range(n)))}] for n in range(2, 50)]  # fmt: skip
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "chats.jsonl").write_text(rows)
    plain = {
        "name": "b9", "output": str(tmp_path / "runs"), "seed": 3,
        "family": {"kind": "causal-lm", "source": str(model)},
        "adapter": {"kind": "lora", "rank": 4, "targets": "all", "input_dropout": 0.1},
        "objective": {"kind": "next-token"},
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "data": {"kind": "chat", "sources": [{"path": str(tmp_path / "chats.jsonl")}], "length": 192,
                 "cache_folder": str(tmp_path / "cache")},
        "engine": {"kind": "torch", "device": "cpu", "recompute": True},
        "parallel": {"shard": 4},
        "schedule": {"steps": 3, "global_batch": 4},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(plain))
    run = tmp_path / "run"
    run.mkdir()
    started = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m",
         "tests.run.save_and_load", str(tmp_path / "config.json"), str(run)],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr[-3000:]
    ranks = [json.loads((run / f"found.{rank}.json").read_text()) for rank in range(4)]
    found = ranks[0]
    assert all(rank == found for rank in ranks)
    assert found["tensors"] == 2 * 7 * 2  # two layers of seven projections, A and B
    assert found["unlike_the_start"] == found["tensors"]  # what was compared had really been trained
    assert found["differing"] == [] and found["differing_at_the_end"] == []
    assert len(found["losses"]) == 3 and found["repeated"] == found["losses"][1:]
    assert (found["step"], len(list((run / "checkpoints" / "global_step_1" / "tensors").glob("shard-*")))) == (3, 4)
