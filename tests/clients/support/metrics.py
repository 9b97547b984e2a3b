"""Reads Prometheus's text format, as far as needed to compare it with the page that lists the metrics.

It does not check the format; `promtool` does.
"""

import re
from dataclasses import dataclass
from pathlib import Path

SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# A row such as: | `postern_rpcs_total` | counter | `method`, `code` | … |
ROW = re.compile(r"\| `(?P<name>postern_\w+)` \| (?P<type>\w+) \|(?P<labels>[^|]*)\|")
QUOTED = re.compile(r"`(\w+)`")


@dataclass(frozen=True)
class Exposition:
    """The contents of `/metrics` at one time."""

    text: str
    # The type of each metric, by its name.
    types: dict[str, str]
    # Each sample's value, by its name and its labels.
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float:
        """The value of a sample. It is zero if the sample is missing: some appear with their first event."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def label_values(self) -> set[tuple[str, str, str]]:
        """Every combination of metric, label and value, without the bounds of buckets."""
        return {
            (self.family(name), label, value)
            for name, labels in self.samples
            for label, value in labels
            if label != "le"
        }

    def family(self, sample: str) -> str:
        """The metric of a sample. The samples of a histogram have additional suffixes."""
        for ending in ("_bucket", "_sum", "_count"):
            if self.types.get(sample.removesuffix(ending)) == "histogram":
                return sample.removesuffix(ending)
        return sample


def read(text: str) -> Exposition:
    types, samples = {}, {}
    for line in filter(None, text.splitlines()):
        if line.startswith("#"):
            _, kind, name, *rest = line.split(" ", 3)
            if kind == "TYPE":
                types[name] = rest[0]
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, f"no sample of Prometheus's text format: {line!r}"
        labels = frozenset(LABEL.findall(sample["labels"] or ""))
        samples[sample["name"], labels] = float(sample["value"])
    return Exposition(text, types, samples)


@dataclass(frozen=True)
class Documented:
    """A row of the page: the type, the names of the labels, and their values where the page lists those."""

    type: str
    labels: dict[str, set[str]]


def documented(page: Path) -> dict[str, Documented]:
    """The table of metrics in the operations page, by name. After a colon it lists the values of the last label."""
    rows = {}
    for line in page.read_text().splitlines():
        if row := ROW.match(line):
            label, _, values = row["labels"].partition(":")
            names = QUOTED.findall(label)
            listed = set(QUOTED.findall(values))
            assert names or not listed, f"values without a label: {line}"
            rows[row["name"]] = Documented(
                row["type"], {name: listed if name == names[-1] else set() for name in names}
            )
    return rows
