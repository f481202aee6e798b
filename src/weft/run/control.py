"""What a trainer does with the commands in its run's inbox, and how it waits while it is paused: all ranks alike."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from weft.errors import did_you_mean
from weft.events import Controlled, Listener, Notice, PhaseStarted
from weft.run.inbox import Command, Inbox
from weft.run.learner import Learner
from weft.run.milestones import Keeper
from weft.run.train import at_any_rank

GLANCE = 0.5  # seconds between two looks into the inbox
MEETING = 1.0  # seconds between two words of several paused ranks: no collective may wait for long
EARLY = "it came before this training began"
LATE = "the training had ended"


class Refused(Exception):
    """A command that cannot be followed now; says why."""


@dataclass
class Control:
    """The commands of one run. inbox: rank 0 has it, and tells the others what came. stop: whether a signal asks for
    the end. ended: a command has ended the run, on all ranks and hosts."""

    keeper: Keeper
    tell: Listener
    stop: Callable[[], bool]
    inbox: Inbox | None
    ended: bool = False
    _paused_since: float | None = None
    _looked: float = -math.inf  # when, by the monotonic clock
    _blind: bool = False  # the inbox could not be read

    # ---- What the loop asks ----

    def begin(self, learner: Learner) -> None:
        """Refuse what lay there before."""
        for command in self.inbox.early if self.inbox else ():
            self._answer(learner, command, False, EARLY)

    def waiting(self) -> bool:
        """Whether this rank knows of a command; one look at the folder now and then."""
        now = time.monotonic()
        if self.inbox is None or now - self._looked < GLANCE:
            return False
        self._looked = now
        try:
            return self.inbox.waiting()
        except OSError as failed:
            self._say_blind(failed)
            return False

    def obey(self, learner: Learner) -> bool:
        """Do what has come, and wait while it is paused. All ranks together. True when the run is to end."""
        return self._follow(learner) or (self._paused_since is not None and self._wait(learner))

    def end(self, learner: Learner) -> None:
        """Refuse what came too late."""
        for command in self._taken():
            self._answer(learner, command, False, LATE)

    # ---- Taking ----

    def _taken(self) -> list[Command]:
        try:
            return self.inbox.take() if self.inbox else []
        except OSError as failed:
            self._say_blind(failed)
            return []

    def _say_blind(self, failed: OSError) -> None:
        """Say once that no command is heard any more; the training is worth more than its inbox."""
        if not self._blind:
            self._blind = True
            self.tell(Notice(text=f"the run's inbox cannot be read ({failed.strerror}): commands are not heard"))

    def _follow(self, learner: Learner) -> bool:
        """Do each command that has come, on every rank. True when one of them ends the run."""
        for fields in learner.engine.agreed([asdict(command) for command in self._taken()]):
            command = Command(**fields)
            try:
                if self.ended:
                    raise Refused(LATE)
                came_of_it = self._done(learner, command)
            except Refused as refused:
                self._answer(learner, command, False, str(refused))
            else:
                self._answer(learner, command, True, came_of_it)
                self.ended |= command.command == "stop"
        return self.ended

    def _answer(self, learner: Learner, command: Command, done: bool, reason: str) -> None:
        self.tell(
            Controlled(
                step=learner.step, id=command.id, command=command.command, arguments=dict(command.arguments),
                by=command.by, done=done, reason=reason,
            )
        )  # fmt: skip

    def _wait(self, learner: Learner) -> bool:
        """Until somebody says resume (False) or asks for the end (True). Signals and all other commands are heard."""
        engine = learner.engine
        self.tell(PhaseStarted(phase="paused"))
        while self._paused_since is not None:
            time.sleep(GLANCE if engine.world == 1 else max(GLANCE, MEETING))
            stopping, asked = at_any_rank(engine, [self.stop(), self.waiting()])
            if stopping:
                return True
            if asked:
                if self._follow(learner):
                    return True
                if self._paused_since is not None:  # it may have told that it saves
                    self.tell(PhaseStarted(phase="paused"))
        self.tell(PhaseStarted(phase="training", total=self.keeper.config.schedule.steps))
        return False

    # ---- Doing: what came of it, in words ----

    def _done(self, learner: Learner, command: Command) -> str:
        if command.refusal:
            raise Refused(command.refusal)
        acts: Mapping[str, Callable[[Learner, Mapping[str, Any]], str]] = {
            "pause": self._pause,
            "resume": self._resume,
            "stop": lambda learner, _: "it saves and ends",
            "save": self._save,
            "validate": self._validate,
            "sample": self._sample,
            "rate": self._rate,
        }
        return acts[command.command](learner, command.arguments)

    def _pause(self, learner: Learner, _: Mapping[str, Any]) -> str:
        if self._paused_since is not None:
            raise Refused("it is paused already")
        self._paused_since = time.monotonic()
        return "its memory stays taken"

    def _resume(self, learner: Learner, _: Mapping[str, Any]) -> str:
        if self._paused_since is None:
            raise Refused("it is not paused")
        seconds, self._paused_since = time.monotonic() - self._paused_since, None
        return f"after a pause of {seconds:.0f} s"

    def _save(self, learner: Learner, _: Mapping[str, Any]) -> str:
        self.keeper.save(learner)
        self.keeper.saver.settle()
        return "the checkpoint is whole"

    def _validate(self, learner: Learner, _: Mapping[str, Any]) -> str:
        if not self.keeper.can_validate:
            raise Refused("this run has nothing to measure: see validation.every and data.validation_items")
        self.keeper.validate(learner)
        last = self.keeper.last
        assert last is not None, "a run that can validate has just done so"
        return "no item could be measured" if last.loss is None else f"loss {last.loss:.4f}"

    def _sample(self, learner: Learner, _: Mapping[str, Any]) -> str:
        if not self.keeper.can_sample:
            raise Refused("this run has no samples.prompts")
        self.keeper.sample(learner)
        return "one of each prompt"

    def _rate(self, learner: Learner, asked: Mapping[str, Any]) -> str:
        """Set the rates, and save at once, so that no crash forgets them: only then is it done."""
        names = list(learner.optimizers)
        chosen = names if asked["optimizer"] is None else [asked["optimizer"]]
        if unknown := set(chosen) - set(names):
            raise Refused(f"there is no optimizer '{unknown.pop()}'. {did_you_mean(chosen[0], names)}")
        before = {name: learner.top_rate(name) for name in chosen}
        after = {name: asked.get("lr") or rate * asked["factor"] for name, rate in before.items()}
        for name, rate in after.items():
            if not (math.isfinite(rate) and rate > 0):
                raise Refused(f"{name}: the rate would be {rate}")
        learner.rates |= after
        self.keeper.save(learner, anew=True)
        self.keeper.saver.settle()
        return ", ".join(f"{name}: {before[name]:.6g} -> {after[name]:.6g}" for name in chosen)


def changed_rates(learner: Learner, saved: Mapping[str, float]) -> list[str]:
    """A sentence for each optimizer whose rate had been set while it trained. saved: top rates by the checkpoint."""
    sentences = []
    for name, rate in saved.items():
        configured = learner.optimizers[name].param_groups[0]["base_lr"]
        if name in learner.rates:
            sentences.append(
                f"{name}: goes on at a learning rate of {rate:.6g}, set while it trained; its config says "
                f"{configured:.6g}. Another lr in the config (resume_allow) counts again, as does weft ctl RUN rate."
            )
        else:
            sentences.append(
                f"{name}: the config's new learning rate {configured:.6g} counts; {rate:.6g}, set while it trained, "
                "is left"
            )
    return sentences
