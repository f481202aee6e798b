"""How several processes share the work: the config section, and the layout that it makes of a number of processes."""

from dataclasses import dataclass
from math import log
from typing import Literal

from pydantic import Field, PositiveInt

from weft.errors import ConfigError
from weft.section import Section

NEAREST = 4  # layouts that a refusal names


@dataclass(frozen=True)
class Layout:
    """data x shard x sequence processes. Ranks run fastest along sequence, then along shard: the groups that talk most
    are those whose processes are most likely on one machine."""

    data: int = 1
    shard: int = 1
    sequence: int = 1

    @property
    def world(self) -> int:
        return self.data * self.shard * self.sequence

    @property
    def data_world(self) -> int:
        """Processes, or groups of one sequence, that read different data."""
        return self.data * self.shard

    def data_rank(self, rank: int) -> int:
        return rank // self.sequence

    def words(self) -> str:
        return f"data={self.data} shard={self.shard} sequence={self.sequence}"


class Parallel(Section):
    """How several processes share the work; their number is data x shard x sequence."""

    data: PositiveInt | Literal["auto"] = Field(
        default="auto", description="groups that train on different data, each with a whole copy; auto: what is left"
    )
    shard: PositiveInt | Literal["auto"] = Field(
        default=1,
        description="processes over which one copy of the weights is spread (FSDP2; with data > 1 HSDP); they train on "
        "different data too. auto: what is left, and data is then 1 unless it says otherwise",
    )
    sequence: PositiveInt = Field(default=1, description="processes that part the tokens of one batch")
    sequence_method: Literal["auto", "ulysses", "ring"] = Field(
        default="auto",
        description="how they attend: each to whole sequences with some of the heads (ulysses; keys and values are "
        "gathered where heads do not divide), or with keys and values that go round (ring: for sequences too long for "
        "one process); auto: ulysses where heads divide or a mask says what is seen, else a ring",
    )

    def resolved(self, world: int) -> Layout:
        """The layout of so many processes. Raises ConfigError with the possible ones when their product is another."""
        data = 1 if self.data == self.shard == "auto" else self.data
        known = self.sequence * (1 if data == "auto" else data) * (1 if self.shard == "auto" else self.shard)
        left = world // known
        layout = Layout(left if data == "auto" else data, left if self.shard == "auto" else self.shard, self.sequence)
        if layout.world != world:
            raise ConfigError(self._refusal(world, known, "auto" in (data, self.shard)))
        return layout

    def least(self) -> Layout:
        """The layout of the fewest processes that this can mean: for plans that are made before any is started."""
        data, shard = (1 if asked == "auto" else asked for asked in (self.data, self.shard))
        return Layout(data, shard, self.sequence)

    def possible(self, world: int) -> list[Layout]:
        """All layouts of so many processes, those nearest to what was asked for first."""
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        layouts = [Layout(world // (s * q), s, q) for s in divisors for q in divisors if world % (s * q) == 0]
        return sorted(layouts, key=self._distance)

    def _distance(self, layout: Layout) -> tuple[int, float]:
        """How many numbers of a layout are others than those that were asked for, and by what factor."""
        asked = ((self.data, layout.data), (self.shard, layout.shard), (self.sequence, layout.sequence))
        factors = [abs(log(found / wanted)) for wanted, found in asked if isinstance(wanted, int)]
        return sum(factor > 0 for factor in factors), sum(factors)

    def _refusal(self, world: int, known: int, open_ended: bool) -> str:
        said = f"data={self.data} shard={self.shard} sequence={self.sequence}"
        makes = f"takes a multiple of {known} processes" if open_ended else f"takes {known} processes"
        here = "1 was started" if world == 1 else f"{world} were started"
        nearest = "; ".join(layout.words() for layout in self.possible(world)[:NEAREST])
        return (
            f"parallel: {said} {makes}, but {here}. Start {known}{' or a multiple' if open_ended else ''}, "
            f"or write what {world} can do: {nearest}."
        )
