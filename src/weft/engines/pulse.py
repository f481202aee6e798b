"""Signs of life of the hosts of a run, through the store in which they met."""

import time

from torch.distributed import Store

PULSE = 1.0  # seconds between two signs of life of a host


class Pulse:
    """Signs of life of the hosts of one round. Without them, a host whose network is gone is noticed only when a
    collective runs out of time, which is minutes to half an hour."""

    DONE = b"done"

    def __init__(self, store: Store, own: int, hosts: int, patience: float) -> None:
        self._store, self._own, self._patience = store, own, patience
        self._others = [number for number in range(hosts) if number != own]
        self._seen = {number: (b"", time.monotonic()) for number in self._others}
        self._next, self._count = 0.0, 0

    def lost(self, done: bool = False) -> list[int]:
        """Show a sign of life, and say which hosts have not for too long. done: the last one, which stays."""
        now = time.monotonic()
        if not self._others or (now < self._next and not done):
            return []
        self._next, self._count = now + PULSE, self._count + 1
        self._store.set(f"weft/pulse/{self._own}", self.DONE.decode() if done else str(self._count))
        for number in self._others:
            key = f"weft/pulse/{number}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if beat != self._seen[number][0] or beat == self.DONE:
                self._seen[number] = (beat, now)
        return [number for number, (_, since) in self._seen.items() if now - since > self._patience]

    def others_done(self) -> bool:
        return all(beat == self.DONE for beat, _ in self._seen.values())
