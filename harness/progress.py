"""How far a long piece of work is: a bar on a terminal, elsewhere a line a minute."""

import datetime
import sys
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm


class Progress:
    """Shows how many of `total` units are done.

    Args:
        label: what is done, for example `teacher epoch 3`; `unit`: of what, for example `images`.
    """

    def __init__(self, total: int, label: str, unit: str):
        self.total, self.label, self.unit, self.done = total, label, unit, 0
        hidden = True if sys.stderr is None else None  # None: tqdm hides the bar unless stderr is a terminal
        self.bar = tqdm(total=total, desc=label, unit=f" {unit}", leave=False, dynamic_ncols=True, disable=hidden)
        self.every = 60 if self.bar.disable else 1  # seconds
        self.began = self.told = time.monotonic()

    def add(self, count: int, means: Callable[[], Mapping[str, float]] = dict) -> None:
        """Counts `count` more; `means`, which may have to wait for the device, is called only when they are shown."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if now - self.told < self.every:
            return
        self.told = now
        if not self.bar.disable:
            self.bar.set_postfix({name: f"{mean:.3f}" for name, mean in means().items()}, refresh=False)
            return
        left = datetime.timedelta(seconds=round((now - self.began) / self.done * (self.total - self.done)))
        shown = "".join(f"  {name} {mean:.3f}" for name, mean in means().items())
        print(f"{self.label}: {self.done:,} of {self.total:,} {self.unit}, {left} left{shown}", flush=True)

    def close(self) -> None:
        """Removes the bar."""
        self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
