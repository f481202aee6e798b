"""Samples of a language model: replies to prompts, made while training and by `weft sample`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from weft.contracts import Model, TextFamily, as_text
from weft.data.templates import MARK, special_tokens
from weft.durable import write_whole
from weft.errors import ConfigError
from weft.events import Listener, PhaseStarted, Sampled
from weft.run.config import Prompt, RunConfig
from weft.run.evaluate import averaged, in_use, resting
from weft.run.learner import Learner
from weft.run.shortage import naming


@dataclass(frozen=True)
class Chat:
    """How a language model is asked. template: jinja in place of the tokenizer's own; without either, the model goes on
    from the bare prompt. system: what the conversation begins with; "": nothing."""

    tokenizer: Any
    template: str | None = None
    system: str = ""

    @property
    def templated(self) -> bool:
        return self.template is not None or bool(self.tokenizer.chat_template)

    def ids(self, prompt: str) -> Tensor:
        """(1, L) tokens up to where the reply begins. Raises ConfigError for what the template refuses."""
        if not self.templated:
            return self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        text = self._text([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end a reply: the tokenizer's own, and the one that the template writes behind a turn."""
        ids = {self.tokenizer.eos_token_id}
        if self.templated:
            text = self._text([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}])
            behind = text.rpartition(MARK)[2].lstrip()
            marks = special_tokens(self.tokenizer.all_special_tokens, self.tokenizer.added_tokens_decoder)
            end = max((mark for mark in marks if behind.startswith(mark)), key=len, default=None)
            ids.add(None if end is None else self.tokenizer.convert_tokens_to_ids(end))
        return frozenset(ids - {None})

    def _text(self, messages: list[dict[str, str]], **options: Any) -> str:
        first = [{"role": "system", "content": self.system}] if self.system else []
        source = self.tokenizer.get_chat_template(self.template)
        try:
            return self.tokenizer.apply_chat_template(
                [*first, *messages], chat_template=source, tokenize=False, **options
            )
        except jinja2.TemplateError as error:
            told = ", with the system prompt before it" if self.system else ""
            raise ConfigError(f"the chat template refuses the prompt{told}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How tokens are chosen. tokens: of the longest reply. temperature 0: always the likeliest; otherwise by chance,
    among the likeliest that have top_p of it together (Holtzman et al. 2020, arXiv:1904.09751)."""

    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """In transformers' words."""
        if not self.temperature:
            return {"do_sample": False}
        # Of the makers' generation_config nothing else may narrow the choice: 0 is no limit.
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    @contextmanager
    def chance(self, device: torch.device) -> Iterator[None]:
        """Seeds the chance that transformers draws from, and gives it back as it was."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.random.manual_seed(self.seed)
            yield


@torch.no_grad()
def replies(model: Model, chat: Chat, prompts: Sequence[str], manner: Manner, device: torch.device) -> list[str]:
    """The model's reply to each prompt, under the adapter in use; the seed counts up from prompt to prompt."""
    return [
        reply(model, chat, prompt, replace(manner, seed=manner.seed + i), device) for i, prompt in enumerate(prompts)
    ]


def reply(model: Model, chat: Chat, prompt: str, manner: Manner, device: torch.device) -> str:
    """What the model says next. Also a token that its makers' generation_config names ends it."""
    network: Any = model.network
    ids = chat.ids(prompt).to(device)
    makers = network.generation_config.eos_token_id
    ends = chat.ends | set(makers if isinstance(makers, list) else [makers] if makers is not None else [])
    padding = chat.tokenizer.pad_token_id
    with manner.chance(device) if manner.temperature else nullcontext():
        made = network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=manner.tokens,
            eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0) if padding is None else padding,
            **manner.options,
        )  # fmt: skip
    said = made[0, ids.shape[1] :].tolist()
    return chat.tokenizer.decode(said[:-1] if said[-1] in ends else said, skip_special_tokens=True)


def chat_of(family: TextFamily, template: Path | None, system: str, place: str) -> Chat:
    """How a model is asked. place: what named the template. Raises ConfigError for one that cannot be read."""
    try:
        source = None if template is None else template.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: {template} cannot be read: {error}.") from error
    return Chat(family.tokenizer(), source, system)


def check_prompts(family: TextFamily, chat: Chat, prompts: Sequence[Prompt], tokens: int, place: str) -> None:
    """Raises ConfigError for what a language model cannot be asked. place: put before each name, such as 'samples.'."""
    problems: list[str] = []
    for prompt in prompts:
        if prompt.image is not None:
            problems.append(f"{place}prompts: {prompt.image} is a first frame, but this is a language model.")
        room = family.context - chat.ids(prompt.text).shape[1]
        if tokens > room:
            mend = f"Write at most {room}." if room > 0 else "Shorten the prompt."
            problems.append(
                f"{place}tokens: behind '{prompt.text[:40]}' there is no room for {tokens} tokens in the "
                f"{family.context} that the model was made for. {mend}"
            )
    if problems:
        raise ConfigError(*problems)


def check_replies(config: RunConfig) -> None:
    """Raises ConfigError for samples that a run's language model cannot make."""
    samples, data = config.samples, config.data
    if samples.prompts:
        chat = chat_of(config.family, data.template, data.system, "data.template")
        check_prompts(config.family, chat, samples.prompts, samples.tokens, "samples.")


@dataclass
class Replies:
    """Makes a run's samples: the likeliest reply to each of its prompts, asked as its conversations ask."""

    config: RunConfig
    tell: Listener

    @cached_property
    def chat(self) -> Chat:
        data = self.config.data
        return chat_of(as_text(self.config.family), data.template, data.system, "data.template")

    def sample(self, learner: Learner, adapter: bool = True) -> list[Path]:
        """A file for every prompt, with the adapters or of the base alone. Every rank answers, and rank 0 writes."""
        samples, engine = self.config.samples, learner.engine
        if not samples.prompts:
            return []
        self.tell(PhaseStarted(phase="sampling", total=len(samples.prompts)))
        prompts, manner = [prompt.text for prompt in samples.prompts], Manner(tokens=samples.tokens)
        with (
            naming("sampling", engine.device), resting(learner.model.network), averaged(learner),
            in_use(learner, adapter), engine.computing(),
        ):  # fmt: skip
            made = replies(learner.model, self.chat, prompts, manner, engine.device)
        if engine.rank != 0:
            return []
        folder = self.config.folder / "samples" / (f"step_{learner.step:06d}" if adapter else "base")
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{i:02d}.txt" for i in range(len(made))]
        for file, prompt, text in zip(files, prompts, made, strict=True):
            write_whole(file, page(prompt, text))
            self.tell(Sampled(step=learner.step, prompt=prompt, seed=0, file=str(file), adapter=adapter))
        return files


def page(prompt: str, text: str) -> str:
    """A prompt and its reply, as they stand in a file."""
    return f"{prompt}\n\n---\n\n{text}\n"
