"""What the user should know of documents before they are trained on, and what cannot be trained on: counts only."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy

from weft.data.documents_labels import Labelling
from weft.data.documents_survey import SPLITS, TEST, TRAIN, Collection
from weft.data.documents_tasks import gaps

if TYPE_CHECKING:
    from weft.data.documents import DocumentsData

FEW = 20  # documents of a task in a split, below which its scores say little


def notices(
    data: "DocumentsData",
    documents: Collection,
    tasks: Sequence[str],
    labels: Labelling,
    twice: int,
) -> list[str]:
    """Sentences. twice: documents whose text is in another split already."""
    said = []
    if data.group is None and data.split is None:
        said.append(
            "There is no data.group, so documents were split one by one: one patient's may be trained and tested on."
        )
    if twice:
        done = "left out" if data.duplicates == "apart" else "in several splits"
        said.append(f"{twice} documents have a text that stands in another split first; they are {done}.")
    if not data.labels and len(data.columns_of_labels) == 1 and len(tasks) > 1:
        said.append(
            "data.labels is empty, so the labels were found in all tasks, later ones too. Declare them to train as if "
            "the future were unknown."
        )
    if missing := gaps(tasks):
        said.append(f"No document is of {', '.join(missing)}, which lies between other years.")
    return said + of_tasks(data, documents, tasks, labels)


def of_tasks(data: "DocumentsData", documents: Collection, tasks: Sequence[str], labels: Labelling) -> list[str]:
    """What is thin: splits of a task that are small, or of one label."""
    said = []
    for split, called in enumerate(SPLITS):
        sizes = {task: documents.within(split, number) for number, task in enumerate(tasks)}
        small = [task for task, own in sizes.items() if len(own) < FEW]
        asked = called == "train" or data.split is not None or getattr(data, called) > 0
        if small and asked:
            said.append(f"{called}: fewer than {FEW} documents of {', '.join(small)}; scores of so few say little.")
        single = [
            task for task, own in sizes.items() if len(own) and not labels.multi_label and one_class(documents, own)
        ]
        if single:
            said.append(f"{called}: all documents of {', '.join(single)} have the same label.")
    if unseen := never_trained(documents, labels):
        said.append(f"{unseen} of {len(labels.names)} labels are in no document that is trained on.")
    return said


def one_class(documents: Collection, own: numpy.ndarray) -> bool:
    return len(numpy.unique(documents.labels[own])) < 2


def never_trained(documents: Collection, labels: Labelling) -> int:
    """How many labels no training document has."""
    own = documents.labels[documents.within(TRAIN)]
    if labels.multi_label:
        return int((~(own == 1).any(0)).sum())
    return len(labels.names) - len(numpy.unique(own))


def problems(
    documents: Collection,
    tasks: Sequence[str],
    labels: Labelling,
    experiences: Mapping[str, numpy.ndarray],
    left_out: Mapping[str, int],
) -> list[str]:
    """Why nothing can be trained, in sentences."""
    if not experiences:
        lost = ", ".join(f"{count} are {why}" for why, count in left_out.items() if count)
        return [f"No document is left to train on.{f' Of the others {lost}.' if lost else ''}"]
    if len(labels.names) < 2 and not labels.multi_label:
        return ["data.label: all documents have the same label, so there is nothing to learn. Is it the right column?"]
    if not any(len(documents.within(TEST, number)) for number in range(len(tasks))):
        return ["No document is left to test on, so nothing could be scored. Raise data.test, or mend data.split."]
    return []
