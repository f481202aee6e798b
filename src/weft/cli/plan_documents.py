"""weft plan for dated documents: counts by year, label and split, and how many steps each experience has."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from weft.run.config import RunConfig
    from weft.run.plan import Plan

UNUSABLE_SHOWN = 5  # rows, unless --all


def print_documents(plan: "Plan", console: "Console", everything: bool) -> None:
    """The survey in numbers. Rows that give no document are told by their place, never by what stands there."""
    console.print("Documents")
    for line in plan.survey.lines():
        console.print(f"  {line}", markup=False, soft_wrap=True)
    unusable = [each.reason for each in plan.survey.unreadable]
    for reason in unusable if everything else unusable[:UNUSABLE_SHOWN]:
        console.print(f"  {reason}", markup=False, soft_wrap=True, style="dim")
    if len(unusable) > UNUSABLE_SHOWN and not everything:
        console.print(f"  {len(unusable) - UNUSABLE_SHOWN} more such; weft plan --all shows them.", markup=False)
    console.print()


def print_experiences(config: "RunConfig", plan: "Plan", console: "Console") -> None:
    """In which order what is trained on, for how many steps, and what a step costs."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from weft.run.documents import last_steps

    stretches = plan.survey.stretches
    if not stretches:
        return
    ends = last_steps(config, stretches, config.schedule.accumulate * plan.layout.data_world)
    title = "Experiences, one after the other" if len(ends) > 1 else "One experience"
    table = Table("experience", "documents", "micro-batches", "steps", "ends with step", title=title,
                  title_justify="left", box=SIMPLE_HEAD)  # fmt: skip
    before = 0
    for name, end in ends.items():
        documents = len(plan.survey.experiences[name])
        table.add_row(name, f"{documents:,}", f"{stretches[name]:,}", f"{end - before:,}", f"{end:,}")
        before = end
    console.print(table)
    learner = config.objective.fitted(ends)
    evaluations = learner.gradient_evaluations
    console.print(
        f"A step of objective {learner.kind} costs about {evaluations:g} forward and backward "
        f"pass{'' if evaluations == 1 else 'es'} of a batch; all years are tested {len(ends) + 1} times.\n",
        markup=False,
        soft_wrap=True,
    )
