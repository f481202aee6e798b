"""What a rank knows of the others when something goes wrong: whether one was lost, and whether one said it already."""

import os
from collections.abc import Iterator
from datetime import timedelta
from hashlib import sha256

from torch.distributed import DistError, TCPStore

PATIENCE = 20.0  # seconds that rank 0 is waited for, which speaks first; on a busy machine it may start later
LOST_PEER = "another process of this run has ended, or cannot be reached"
# What gloo and NCCL say when a connection ends; gloo's errors have no type of their own.
SAID_OF_LOST_PEERS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "pair closure", "Timed out waiting",
    "communicator was aborted", "Connection refused", "remote process exited",
)  # fmt: skip


def lost_peer(error: BaseException) -> bool:
    """Whether an error means that another rank, or the way to it, is gone."""
    return any(
        isinstance(link, DistError)
        or (isinstance(link, RuntimeError | OSError) and any(word in str(link) for word in SAID_OF_LOST_PEERS))
        for link in causes(error)
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def is_to_be_told(rank: int, text: str) -> bool:
    """Whether this rank is the one that tells an error which others may have met too: rank 0, else the first.

    Asked is the launcher's store, where there is one (torchrun, accelerate); without it every rank tells.
    """
    store = launchers_store()
    if store is None:
        return True
    round_ = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"weft/told/{round_}/{sha256(text.encode()).hexdigest()}"
    try:
        if rank == 0:
            store.set(f"{key}/0", "told")
            return True
        try:
            store.wait([f"{key}/0"], timedelta(seconds=PATIENCE))
            return False
        except DistError:
            return store.add(f"{key}/others", 1) == 1
    except DistError:  # the launcher has ended meanwhile
        return True


def launchers_store() -> TCPStore | None:
    """The store that a launcher of torch's keeps for its ranks; None where nobody keeps one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
    except DistError:
        return None
