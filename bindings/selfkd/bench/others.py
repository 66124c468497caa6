"""What other programs take of the machine while one is measured."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import torch


def busy_seconds(stat: str) -> tuple[float, int]:
    """The time that all CPUs have worked, by the text of /proc/stat, and how many they are."""
    lines = stat.splitlines()
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, lines[0].split()[1:])
    ticks = user + nice + system + irq + softirq + steal
    count = sum(re.match(r"cpu\d", line) is not None for line in lines)
    return ticks / os.sysconf("SC_CLK_TCK"), count


class Others:
    """What other programs take of the CPUs while samples are taken; also other guests of the machine."""

    def __enter__(self) -> Others:
        self.cores, self.lacking = 0.0, 0.0
        self.start = self.now()
        return self

    @staticmethod
    def now() -> tuple[float, float, float, int]:
        path = Path("/proc/stat")
        all_of_them, count = busy_seconds(path.read_text()) if path.exists() else (0.0, 0)
        return time.perf_counter(), all_of_them, time.process_time(), count

    def __exit__(self, *exception: Any) -> None:
        """`cores`: how many others kept busy. `lacking`: how many more this process would have used."""
        begin, busy, own, count = self.start
        end, busy_then, own_then, _ = self.now()
        passed = max(end - begin, 1e-9)
        self.cores = max(0.0, (busy_then - busy) - (own_then - own)) / passed
        self.lacking = max(0.0, self.cores + torch.get_num_threads() - count) if count else 0.0
