"""accelerate's configs in the words of ours: by their variables, and through `accelerate launch` itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from weft.cli.accelerated import accelerate_overrides
from weft.errors import ConfigError

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def test_without_accelerate_nothing_is_implied():
    assert accelerate_overrides({"RANK": "0", "WORLD_SIZE": "2"}, {}) == []


def test_the_values_that_accelerate_writes_when_nobody_chose_imply_nothing():
    defaults = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False",
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}  # fmt: skip
    assert accelerate_overrides(defaults, {}) == []


@pytest.mark.parametrize(
    ("environment", "overrides"),
    [
        (FSDP, ["parallel.shard=auto"]),
        ({**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "1"}, ["parallel.shard=auto"]),
        ({**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD", "LOCAL_WORLD_SIZE": "8"},
         ["parallel.shard=8"]),
        ({**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, []),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, ["parallel.shard=auto", "engine.recompute=true"]),
        (ZERO, ["engine.kind=deepspeed", "engine.zero=3"]),
        ({**ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16"},
         ["engine.precision=bf16", "schedule.accumulate=4", "engine.kind=deepspeed", "engine.zero=3"]),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
         ["engine.kind=deepspeed", "engine.zero=3", "engine.offload_optimizer=true"]),
        ({"ACCELERATE_USE_CPU": "true"}, ["engine.device=cpu"]),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
          "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4", "PARALLELISM_CONFIG_SP_SIZE": "2"},
         ["parallel.data=2", "parallel.shard=4", "parallel.sequence=2"]),
    ],
)  # fmt: skip
def test_options_become_keys_that_the_config_leaves_open(environment, overrides):
    assert accelerate_overrides(environment, {"name": "run"}) == overrides


def test_a_key_that_says_the_same_already_is_left_alone():
    assert accelerate_overrides(FSDP, {"parallel": {"shard": 4}}) == []
    assert accelerate_overrides(ZERO, {"engine": {"kind": "deepspeed", "zero": 3}}) == []


def test_contradictions_are_refused_by_name_and_all_at_once():
    written = {"parallel": {"shard": 1}, "engine": {"precision": "fp16"}}
    with pytest.raises(ConfigError) as refused:
        accelerate_overrides({**FSDP, "ACCELERATE_MIXED_PRECISION": "bf16"}, written)
    precision, shard = sorted(refused.value.problems)
    assert precision.startswith(
        "engine.precision is fp16 in the config, and accelerate's ACCELERATE_MIXED_PRECISION=bf16"
    )
    assert shard.startswith("parallel.shard is 1 in the config, and accelerate's FSDP_SHARDING_STRATEGY=FULL_SHARD")


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION is fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND is INDUCTOR"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM"),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "FSDP_SHARDING_STRATEGY is SHARD_GRAD_OP"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "FSDP_AUTO_WRAP_POLICY is SIZE_BASED_WRAP"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "ACCELERATE_DEEPSPEED_ZERO_STAGE is 1"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_parameters is nvme"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "TP_SIZE is 2"),
    ],
)
def test_what_has_no_meaning_here_is_refused_by_name(environment, name):
    with pytest.raises(ConfigError, match=f"{name}.*has no meaning here"):
        accelerate_overrides(environment, {})


def test_a_deepspeed_config_file_is_read_for_what_it_says(tmp_path):
    file = tmp_path / "zero.json"
    options = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True},
               "gradient_accumulation_steps": "auto", "gradient_clipping": 0.5,
               "train_micro_batch_size_per_gpu": 2}  # fmt: skip
    file.write_text(json.dumps(options))
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    assert set(accelerate_overrides(environment, {})) == {
        "engine.kind=deepspeed", "engine.zero=2", "engine.offload_optimizer=true", "engine.precision=bf16",
        "schedule.max_norm=0.5", "data.batch_size=2",
    }  # fmt: skip
    file.write_text(json.dumps({**options, "sparse_attention": {}}))
    with pytest.raises(ConfigError, match="sparse_attention"):
        accelerate_overrides(environment, {})


# ---- The launchers themselves --------------------------------------------------------------------------------------


def launched(*command: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """A launcher of this installation, with weft as its program. python: of the ranks."""
    program = Path(sys.executable).with_name(command[0])
    if not program.exists():
        pytest.skip(f"{command[0]} is not installed")
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHON_EXEC": python}
    return subprocess.run(
        [str(program), *command[1:]], capture_output=True, text=True, timeout=250, env=quiet, check=False
    )


ACCELERATE = {"compute_environment": "LOCAL_MACHINE", "machine_rank": 0, "num_machines": 1, "num_processes": 2,
              "mixed_precision": "no", "use_cpu": False}  # fmt: skip
KINDS = {
    "fsdp": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True,
             "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
    "deepspeed": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2, "zero3_init_flag": False}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_launch_trains_on_two_processes_as_its_config_says(run_yaml, tmp_path, quick_python, kind):
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    config = tmp_path / "accelerate.yaml"
    config.write_text(yaml.safe_dump(ACCELERATE | KINDS[kind]))
    plain = yaml.safe_load(run_yaml.read_text())
    run_yaml.write_text(yaml.safe_dump({**plain, "engine": {"device": "cpu"}}))  # which leaves the kind open
    short = ["schedule.steps=1", "schedule.warmup=0", "save.formats=[peft]"]
    command = ["accelerate", "launch", "--config_file", str(config), "-m", "weft", "train", str(run_yaml), *short]
    done = launched(*command, python=sys.executable if kind == "fsdp" else quick_python)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "run"
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    means = {"fsdp": resolved["parallel"]["shard"] == "auto", "deepspeed": resolved["engine"].get("zero") == 2}
    assert means[kind] and (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "events.rank1.jsonl").is_file()
    assert done.stdout.count("adapter: ") == 1 and done.stderr.count("training run: step 0 of 1") == 1


def test_under_torchrun_a_users_mistake_is_told_once_for_all_ranks(run_yaml, tmp_path, quick_python):
    broken = shutil.copy(run_yaml, tmp_path / "broken.yaml")
    mistakes = ["adapter.rnak=4", "schedule.steps=0"]
    done = launched("torchrun", "--nproc-per-node", "2", "-m", "weft", "train", str(broken), *mistakes,
                    python=quick_python)  # fmt: skip
    told = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(told) == 2 and "rnak" in done.stderr and "schedule.steps" in done.stderr
    assert done.stderr.count("exitcode  : 2") + done.stderr.count("exitcode  : -15") == 2
