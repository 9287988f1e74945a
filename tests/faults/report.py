"""What was tried, what came of it, and what was missed."""

import json
import time
from dataclasses import asdict, dataclass, field

SHOWN_MISSES = 8


@dataclass
class Count:
    """A line of the table: N of N, or the misses by name."""

    name: str
    tried: int = 0
    passed: int = 0
    misses: list = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    skipped: str = ""

    def add(self, what, problem=""):
        self.tried += 1
        if problem:
            self.misses.append(f"{what}: {problem}")
        else:
            self.passed += 1

    def take(self, other):
        """Add what another one has counted."""
        self.tried += other.tried
        self.passed += other.passed
        self.misses += other.misses
        for fact, number in other.facts.items():
            self.tally(fact, number)

    def tally(self, fact, number=1):
        self.facts[fact] = self.facts.get(fact, 0) + number

    def line(self):
        if self.skipped:
            return f"  SKIPPED      {self.name}: {self.skipped}"
        facts = "; ".join(f"{k}: {v}" for k, v in sorted(self.facts.items()))
        counts = f"{self.passed} of {self.tried}"
        return f"  {counts:<12} {self.name}" + (f" ({facts})" if facts else "")


def skipped(name, reason):
    return Count(name, skipped=reason)


@dataclass
class Report:
    """All counts of all parts."""

    parts: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    thin: int = 1

    def run(self, part, counts_of):
        """Run a part; print its counts."""
        began = time.monotonic()
        print(f"{part}", flush=True)
        self.parts[part] = []
        for count in counts_of():
            self.parts[part].append(count)
            print(count.line(), flush=True)
            for miss in count.misses[:SHOWN_MISSES]:
                print(f"      MISS {miss}", flush=True)
            if len(count.misses) > SHOWN_MISSES:
                print(f"      and {len(count.misses) - SHOWN_MISSES} more", flush=True)
        self.seconds[part] = time.monotonic() - began
        print(f"  {self.seconds[part]:.0f} s", flush=True)

    @property
    def missed(self):
        # A line that tried nothing, and says no reason, is a miss as well.
        return sum(
            len(c.misses) or (not c.tried and not c.skipped)
            for counts in self.parts.values()
            for c in counts
        )

    def write_json(self, path):
        parts = {n: [asdict(c) for c in counts] for n, counts in self.parts.items()}
        whole = {"parts": parts, "seconds": self.seconds, "thin": self.thin}
        path.write_text(json.dumps(whole, indent=1) + "\n")
