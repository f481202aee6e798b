"""Help and the JSON schema come from the fields themselves."""

from importlib.resources import files

import pytest

from tests.config.small import Small
from weft.config.explain import explain, keys, schema, schema_text
from weft.config.parse import parse
from weft.config.peers import PEERS
from weft.config.source import read_text
from weft.errors import ConfigError
from weft.run.config import RunConfig


def test_help_on_a_key_says_default_type_meaning_and_other_names():
    said = explain(RunConfig, "adapter.lora.rank")
    assert said.splitlines()[0] == "adapter.rank = 16  (a whole number of at least 1)"
    assert "network_dim" in said and "lora_rank" in said


def test_help_on_a_section_lists_its_keys_and_kinds():
    said = explain(Small, "adapter")
    assert "adapter (kind: lora): A small adapter." in said and "adapter (kind: full): All weights." in said
    assert "rank = 16  (a whole number of at least 1)\n      inner width." in said


def test_a_comment_behind_a_field_is_its_help():
    assert "null: the rank." in explain(Small, "adapter.lora.alpha")


def test_help_without_a_section_lists_all_of_them():
    said = explain(RunConfig)
    assert all(f"  {name}" in said for name in RunConfig.model_fields)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("adaptr", "there is no 'adaptr'. Did you mean 'adapter'?"),
        ("adapter.rnak", "there is no 'rnak' in 'adapter'. Did you mean 'rank'?"),
        ("name.first", "'name' is a single value and has no 'first' in it."),
    ],
)
def test_help_on_what_is_not_there_names_the_nearest(path: str, said: str):
    with pytest.raises(ConfigError) as caught:
        explain(Small, path)
    assert said in str(caught.value)


def test_every_name_of_other_trainers_leads_to_a_key_that_exists():
    ours = set(keys(RunConfig))
    assert [name for name, peer in PEERS.items() if peer.ours not in ours] == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("parallel.ulysses_size=2", "This is VeOmni's name of parallel.sequence."),
        ("dp_shard_size=2", "This is accelerate's name of parallel.shard."),
        ("engine.zero_stage=3", "This is accelerate's name of engine.zero. It needs kind: deepspeed."),
        ("global_batch_size=8", "name of schedule.global_batch. accumulate follows from it."),
        ("schedule.num_train_epochs=3", "name of schedule.epochs. It stands in place of steps."),
        ("epochs=3", "Write it as schedule.epochs."),
        ("save.save_epochs=1", "This is VeOmni's name of save.every_epochs."),
        ("load_path=auto", "This is VeOmni's name of resume."),
        ("data={kind: chat, max_seq_len: 2048}", "This is VeOmni's name of data.length. It needs kind: chat."),
        ("parallel.tp_size=2", "Tensors are not parted here"),
    ],
)
def test_names_of_distributed_trainers_are_answered_with_ours(line: str, said: str):
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, read_text("name: run", overrides=[line]))
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("objective={kind: dmd, gen_update_interval: 5}", "This is VideoX-Fun's name of objective.student_every."),
        ("dfake_gen_update_ratio=5", "name of objective.student_every."),
        ("denoising_step_list=[1000, 750, 500, 250]", "name of objective.steps. It is their number"),
        ("objective={kind: dmd, real_guidance_scale: 6}", "name of objective.guidance. It is the same g"),
        ("guidance_scale=3", "Of a teacher it is objective.guidance, Self-Forcing's plus 1."),
        ("learning_rate_critic=1e-6", "This is VideoX-Fun's name of roles.NAME.optimizer.lr. NAME is critic."),
        ("roles={critic: {lr_critic: 4e-7}}", "This is Self-Forcing's name of roles.NAME.optimizer.lr."),
        ("ema={ema_weight: 0.99}", "This is Self-Forcing's name of ema.decay."),
        ("real_name=Wan2.1-T2V-14B", "Teacher, student and critic are one base."),
        ("family={kind: wan, source: x, boundary_type: low}", "This is VideoX-Fun's name of family.expert."),
    ],
)
def test_names_of_trainers_that_distil_are_answered_with_ours(line: str, said: str):
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, read_text("name: run", overrides=[line]))
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_no_name_of_other_trainers_is_a_key_of_ours_in_the_same_place():
    assert [name for name, peer in PEERS.items() if peer.ours.rpartition(".")[2] == name] == []


def test_the_schema_describes_fields_and_allows_extends():
    found = schema(Small)
    assert found["$defs"]["Lora"]["properties"]["alpha"]["description"] == "null: the rank"
    assert "extends" in found["properties"] and found["additionalProperties"] is False


def test_the_shipped_schema_is_that_of_the_run_config():
    # To renew it: weft config schema > src/weft/weft.schema.json
    assert (files("weft") / "weft.schema.json").read_text(encoding="utf-8") == schema_text(RunConfig)
