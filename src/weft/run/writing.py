"""Samples of a language model: replies to the same prompts each time, as text files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weft.contracts import Model, TextFamily, as_text
from weft.durable import write_whole
from weft.events import Listener, PhaseStarted, Sampled
from weft.run.config import Prompt, RunConfig
from weft.run.evaluate import averaged, in_use, resting
from weft.run.learner import Learner
from weft.run.shortage import naming


@dataclass
class Replies:
    """Makes a run's samples."""

    config: RunConfig
    tell: Listener

    def sample(self, learner: Learner, adapter: bool = True) -> list[Path]:
        """A file for every prompt, with the adapters or of the base alone. Every rank answers, and rank 0 writes."""
        samples, engine = self.config.samples, learner.engine
        if not samples.prompts:
            return []
        self.tell(PhaseStarted(phase="sampling", total=len(samples.prompts)))
        with (
            naming("sampling", engine.device), resting(learner.model.network), averaged(learner),
            in_use(learner, adapter), engine.computing(),
        ):  # fmt: skip
            replies = answers(learner.model, samples.prompts, samples.tokens, engine.device)
        if engine.rank != 0:
            return []
        folder = self.config.folder / "samples" / (f"step_{learner.step:06d}" if adapter else "base")
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{i:02d}.txt" for i in range(len(replies))]
        for file, prompt, reply in zip(files, samples.prompts, replies, strict=True):
            write_whole(file, f"{prompt.text}\n\n---\n\n{reply}\n")
            self.tell(Sampled(step=learner.step, prompt=prompt.text, seed=0, file=str(file), adapter=adapter))
        return files


@torch.no_grad()
def answers(model: Model, prompts: Sequence[Prompt], tokens: int, device: torch.device) -> list[str]:
    """The likeliest reply to each prompt, token by token, under the adapter in use."""
    family = as_text(model.family)
    return [answer(model, family, prompt.text, tokens, device) for prompt in prompts]


def answer(model: Model, family: TextFamily, prompt: str, tokens: int, device: torch.device) -> str:
    """At most so many tokens of reply to a user's message, greedily."""
    tokenizer = family.tokenizer()
    asked = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    network: Any = model.network
    made = network.generate(
        input_ids=ids["input_ids"].to(device), attention_mask=ids["attention_mask"].to(device), max_new_tokens=tokens,
        do_sample=False, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
