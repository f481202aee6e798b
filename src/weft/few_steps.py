"""At which times a few-step model is asked: plain numbers, which files and configs carry without torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import inf

MOST_STEPS = 8


@dataclass(frozen=True)
class StepList:
    """Times in (0, 1] from noise to data at which a few-step student is asked. Each answer is an estimate of the data,
    which is mixed with fresh noise to the next time; the last answer is the sample. It is asked once a step, without
    guidance: that was distilled into it. Yin et al. 2024, arXiv:2405.14867, section 4.5.

    shift: from which the times were made, and with which other lengths of the list are.
    """

    times: tuple[float, ...]
    shift: float

    @classmethod
    def of(cls, steps: int, shift: float) -> "StepList":
        """Even times from 1 down, moved toward noise: 4 steps at shift 5 are 1, 0.9375, 0.8333, 0.625."""
        even = [1 - i / steps for i in range(steps)]
        return cls(tuple(shift * t / (1 + (shift - 1) * t) for t in even), shift)

    def resized(self, steps: int) -> "StepList":
        """The list of another length at the same shift; itself where the length is its own."""
        return self if steps == len(self.times) else StepList.of(steps, self.shift)

    def __str__(self) -> str:
        count = "1 step" if len(self.times) == 1 else f"{len(self.times)} steps"
        return f"{count} at {', '.join(f'{t:.4g}' for t in self.times)} (shift {self.shift:g})"

    def to_json(self) -> str:
        """For a file's header: what a program needs to sample what the file holds."""
        return json.dumps({**asdict(self), "steps": len(self.times), "guidance": 1.0, "renoise": "fresh"})

    @classmethod
    def from_json(cls, text: str) -> "StepList":
        """Raises ValueError for text that is no list of times."""
        try:
            said = json.loads(text)
            return cls(_checked(said["times"]), _positive(said["shift"]))
        except (KeyError, TypeError, ValueError) as wrong:
            raise ValueError(f"'{text[:60]}' is no list of denoising steps: {wrong}") from wrong


def _checked(times: Sequence[float]) -> tuple[float, ...]:
    found = tuple(float(t) for t in times)
    falling = all(later < earlier for earlier, later in pairwise(found))
    if not (found and falling and found[0] <= 1 and found[-1] > 0):
        raise ValueError("times must fall from 1 and stay above 0")
    return found


def _positive(number: float) -> float:
    found = float(number)
    if not 0 < found < inf:
        raise ValueError("a shift is above 0")
    return found
