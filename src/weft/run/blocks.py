"""Whether a run's blocks are compiled, and how much each may keep for its backward pass, where the config says auto."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil

from torch import nn

from weft.contracts import Engine
from weft.engines.compiling import Compiler, compiler_missing
from weft.engines.parallel import Layout
from weft.engines.single_device import SingleEngine
from weft.engines.torch_engine import Torch
from weft.events import Listener, Notice
from weft.run.config import RunConfig
from weft.run.estimate import Card, card_of, composed, device_of, most_at, rehearsals
from weft.run.parts import trained_of
from weft.run.questions import Shape
from weft.run.ranks import decided
from weft.run.shares import ALONE

BUDGETS = (1.0, 0.7, 0.5, 0.4, 0.3, 0.1, 0.0)
ROOM = 0.92  # of a device that a run may be planned to fill: allocators leave gaps
# What compiling costs and gains, of a block with a LoRA on all linear layers: predictions from counted operators and
# bytes, of which no GPU has been asked yet. Two graphs are compiled, each for the forward and the backward pass.
COMPILING = 60.0  # seconds of each kind of block, under each role
OPERATORS, LAUNCH = 400, 5e-6  # launches that are spared in a block, and seconds of one
TRAFFIC, BANDWIDTH = 400, 2e12  # tensors (N, d) of two bytes that are not moved, and bytes that a GPU moves in a second


@dataclass(frozen=True)
class Choice:
    """What was chosen for the blocks, and why, in words. needs: bytes that a process needs under each budget that was
    looked at, for its largest shape."""

    compile: bool
    budget: float | None
    why: str
    needs: Mapping[float, int] = field(default_factory=dict)

    def applied(self, config: RunConfig) -> RunConfig:
        """The config with the choice in place of auto."""
        if not isinstance(config.engine, Torch):
            return config
        budget = self.budget if self.compile else None
        engine = config.engine.model_copy(update={"compile": self.compile, "activation_budget": budget})
        return config.model_copy(update={"engine": engine})

    def lines(self) -> list[str]:
        """The choice for a plan."""
        if not self.compile:
            return [f"blocks: not compiled ({self.why})"]
        needs = ", ".join(f"{budget:g}: {size / 2**30:.1f} GiB" for budget, size in self.needs.items())
        budget = "" if self.budget is None else f", memory budget {self.budget:g}"
        return [f"blocks: compiled{budget} ({self.why})", *([f"memory under each budget: {needs}"] if needs else [])]


def choice_of(
    config: RunConfig, shapes: Mapping[Shape, int], card: Card | None = None, layout: Layout = ALONE
) -> Choice:
    """What auto means for a run. shapes: items of an epoch by shape. card: that the run is planned for, if not this
    machine's."""
    engine, asked_of = config.engine, card is None
    if not isinstance(engine, Torch):
        return Choice(False, None, f"engine.kind is {engine.kind}")
    if engine.compile is not True:
        why_not = unwanted(config, shapes, card_of(config) if card is None else card, layout, asked_of)
        if why_not is not None:
            return Choice(False, None, why_not)
    why = "engine.compile is true" if engine.compile is True else "auto: the run is long enough to win it back"
    budget = engine.activation_budget
    if budget != "auto" or engine.recompute or not shapes:
        return Choice(True, budget if isinstance(budget, float) else None, why)
    return fitting(config, max(shapes, key=lambda shape: shape.tokens), card or card_of(config), layout, why)


def unwanted(config: RunConfig, shapes: Mapping[Shape, int], card: Card, layout: Layout, here: bool) -> str | None:
    """Why auto does not compile; None where it does. here: on this machine's own device."""
    engine = config.engine
    assert isinstance(engine, Torch)
    reasons: list[tuple[bool, Callable[[], str]]] = [
        (engine.compile is False, lambda: "engine.compile is false"),
        (not card.gpu or device_of(config).type == "mps", lambda: "auto: only on GPUs with Triton"),
        (engine.recompute == "selective", lambda: "engine.recompute is selective"),
        (layout.sequence > 1, lambda: "parallel.sequence: ranks exchange tokens inside blocks"),
        ("functional" in config.objective.needs, lambda: f"objective {config.objective.kind} has fast weights"),
        (not shapes, lambda: "auto: nothing to train on"),
    ]
    for applies, said in reasons:
        if applies:
            return said()
    device = device_of(config)
    missing = compiler_missing(device) if here or device.type == "cuda" else None
    if missing is not None:
        return f"auto: {missing}"
    needed, steps = steps_to_pay(config, shapes, layout), config.schedule.steps
    return f"auto: pays from about {needed:,} steps on, and there are {steps:,}" if steps < needed else None


def steps_to_pay(config: RunConfig, shapes: Mapping[Shape, int], layout: Layout = ALONE) -> int:
    """Steps after which compiling has won back the time that it takes, as predicted for a large GPU."""
    family = config.family
    network = family.skeleton()
    blocks = family.blocks(network)
    kinds = len({type(block) for block in blocks})
    width = min((m.in_features for m in blocks[0].modules() if isinstance(m, nn.Linear)), default=1)
    items = sum(shapes.values()) or 1
    tokens = sum(shape.tokens * count for shape, count in shapes.items()) / items * config.data.batch_size
    moved = TRAFFIC * 2 * tokens * width / BANDWIDTH
    gain = len(blocks) * max(OPERATORS * LAUNCH, moved) * config.schedule.accumulate
    roles = len(config.objective.roles(family.experts))
    return ceil(COMPILING * kinds * roles / gain)


def fitting(config: RunConfig, shape: Shape, card: Card, layout: Layout, why: str) -> Choice:
    """The largest budget under which a process fits its device; the smallest, where none does."""
    if card.memory is None:
        return Choice(True, 1.0, why)
    compiled = Choice(True, 1.0, why).applied(config)
    found, trained = rehearsals(compiled, shape, layout.sequence), trained_of(config)
    needs: dict[float, int] = {}
    for budget in BUDGETS:
        needs[budget] = composed(compiled, most_at(found, budget), trained, card, layout).total
        if needs[budget] <= ROOM * card.memory:
            break
    return Choice(True, min(needs), why, needs)


def compile_as_chosen(config: RunConfig, shapes: Mapping[Shape, int], engine: Engine, tell: Listener) -> None:
    """Have an engine compile the blocks that it is given, or not, and say so. Every rank chooses as the first does."""
    if not isinstance(config.engine, Torch):
        return
    assert isinstance(engine, SingleEngine)
    strict = config.engine.compile is True

    def chosen() -> tuple[bool, float, str]:
        choice = choice_of(config, shapes, layout=engine.processes.layout)
        return choice.compile, 1.0 if choice.budget is None else choice.budget, choice.lines()[0]

    compiled, budget, sentence = decided(engine, chosen)
    if not compiled:
        engine.compile_with(None)
        return
    tell(Notice(text=sentence))
    engine.compile_with(Compiler(budget=budget, strict=strict, tell=lambda said: tell(Notice(text=said))))
