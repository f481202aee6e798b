"""What `weft show` says of what a training left: our checkpoints and runs, and the checkpoints of others."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from weft.cli.show_words import Facts, json_in, json_of, size_words
from weft.errors import RunError

ZERO_RANK = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")  # DeepSpeed's, of one process
ACCELERATE = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model/")


def checkpoint_facts(folder: Path) -> Facts:
    """Of a checkpoint of ours. Sizes are compared, hashes are not: resuming does that."""
    manifest = json_of(folder / "manifest.json")
    if not manifest or "files" not in manifest:
        raise RunError(f"{folder}: its manifest.json is damaged. Resume from another checkpoint.")
    files: Mapping[str, Any] = manifest["files"]
    wrong = [n for n, f in files.items() if not (folder / n).is_file() or (folder / n).stat().st_size != f["bytes"]]
    return {
        "what": "a checkpoint, to resume from",
        "step": manifest["step"],
        "size": size_words(sum(file["bytes"] for file in files.values())),
        "whole": f"no: {', '.join(wrong)} missing or of another size" if wrong else "yes, by the sizes of its files",
        "tensors": (folder / "state.json").read_text().count('"$tensor"') if not wrong else "(not read)",
        "config": json_of(folder / "config.json"),
    }


def foreign_checkpoint_facts(folder: Path) -> Facts:
    """Of a checkpoint that another program wrote, and what can be done with it; nothing for other folders."""
    return _deepspeed(folder) or _distributed(folder) or _accelerate(folder) or _trainer(folder)


def _deepspeed(folder: Path) -> Facts:
    latest = folder / "latest"
    inner = folder
    if latest.is_file() and (tagged := folder / latest.read_text(encoding="utf-8").strip()).is_dir():
        inner = tagged
    files = sorted(path for path in inner.iterdir() if path.is_file())
    ranks = [path for path in files if ZERO_RANK.search(path.name)]
    states = [path for path in files if path.name.endswith("model_states.pt")]
    if not ranks and not (latest.is_file() and states):
        return {}
    return {
        "what": "a checkpoint of DeepSpeed" + (", cut by ZERO" if ranks else ""),
        "step": inner.name.rpartition("global_step")[2] or "?",
        "processes": len(ranks) or len(states),
        "size": size_words(sum(path.stat().st_size for path in files)),
        "pickle": "yes: not loaded here",
        "use": f"weft convert {folder} --out weights.safetensors makes one file of it",
    }


def _distributed(folder: Path) -> Facts:
    files = sorted(folder.glob("*.distcp"))
    if not files and not (folder / ".metadata").is_file():
        return {}
    return {
        "what": "a checkpoint of torch's DCP",
        "files": len(files),
        "size": size_words(sum(path.stat().st_size for path in files)),
        "index": "a pickle, not loaded here" if (folder / ".metadata").is_file() else "missing, so it cannot be read",
        "use": f"weft convert {folder} --out weights.safetensors --allow-pickle, if you trust its writer",
    }


def _accelerate(folder: Path) -> Facts:
    """As accelerate's save_state leaves it, which musubi, VideoX-Fun and diffusers' scripts call."""
    there = [name for name in ACCELERATE if (folder / name).is_file()]
    if len(there) < 2:
        return {}
    weights = next((name for name in WEIGHTS if (folder / name).exists()), None)
    usable = weights == "model.safetensors"
    return {
        "what": "a training state of accelerate (musubi, VideoX-Fun, diffusers' scripts)",
        "weights": weights or "none beside it: the trainer keeps them elsewhere",
        "pickle": f"yes: {', '.join(there)}, not loaded here",
        **({"step": step} if (step := json_of(folder / "train_state.json").get("current_step")) else {}),
        "use": "its trainer goes on from it; Weft begins from the weights alone"
        + (f": weft show {folder / 'model.safetensors'}" if usable else ""),
    }


def _trainer(folder: Path) -> Facts:
    """As transformers' Trainer leaves it, of a whole model: adapters are told as adapters."""
    state = json_of(folder / "trainer_state.json")
    if not state:
        return {}
    return {
        "what": "a checkpoint of transformers' Trainer",
        "step": state.get("global_step", "?"),
        "epoch": state.get("epoch", "?"),
        "weights": ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))) or "none in .safetensors",
        "use": "the Trainer goes on from it; for Weft its folder is a model, if config.json and tokenizer are in it",
    }


# ---- Runs ---------------------------------------------------------------------------------------------------------


def run_facts(folder: Path) -> Facts:
    """Of a run's folder."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    checkpoints = [path.name for path in _by_step(folder / "checkpoints")]
    finished = sorted(path.name for path in folder.glob("adapter*") if path.is_dir())
    adapters = [*(path.name for path in _by_step(folder)), *finished]
    return {
        "what": "a run",
        "name": config.get("name", folder.name),
        **_progress(folder / "events.rank0.jsonl", config),
        "checkpoints": checkpoints or "none",
        "adapters": adapters or "none",
        "samples": len([path for path in folder.glob("samples/**/*") if path.is_file()]),
        **_scores(folder),
        "config": config,
    }


def _scores(folder: Path) -> Facts:
    """The matrix of a run over a stream of documents; nothing of other runs."""
    from weft.run.score_table import scored_run, table_lines

    found = scored_run(folder)
    return {"scores": "\n".join(table_lines(found))} if found else {}


def _progress(log: Path, config: Mapping[str, Any]) -> Facts:
    if not log.is_file():
        return {"state": "not started"}
    events = [event for line in log.read_text(encoding="utf-8").splitlines() if (event := json_in(line))]
    steps = [event for event in events if event.get("event") == "step"]
    state = "no end in the log: it runs, or was killed"
    if events and events[-1].get("event") == "run_ended":
        reason = events[-1].get("reason")
        state = events[-1]["outcome"] + (f": {reason}" if reason else "")
    started = [event for event in events if event.get("event") == "run_started"]
    total = started[-1]["total_steps"] if started else config.get("schedule", {}).get("steps", "?")
    last = steps[-1] if steps else {"step": 0, "metrics": {}}
    return {"state": state, "step": f"{last['step']} of {total}", "last metrics": last["metrics"] or "none"}


def _by_step(folder: Path) -> list[Path]:
    """Folders global_step_N and, of an expert, global_step_N_high, by their step."""
    found = {path: path.name.split("_")[2] for path in folder.glob("global_step_*")}
    return sorted((path for path in found if found[path].isdecimal()), key=lambda path: (int(found[path]), path.name))
