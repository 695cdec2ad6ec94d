"""Figures that every process adds to and every API process tells alike: histograms and counters, in the database.

Whoever observes something that has a transaction adds it in that transaction, so what is counted is what was
committed. Only sums are kept, no observations: nothing that is deleted elsewhere makes a figure fall.
"""

import bisect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Connection, Double, String, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Mapped, mapped_column

from server.jobs.database import Database
from server.jobs.model import Base

__all__ = ["Measure", "MeasureSum", "Observation", "Sums", "add_observations", "add_sums", "read_measures"]

_MOST_LABEL_CHARACTERS = 600


class MeasureSum(Base):
    """What was observed of one measure with the same labels, at most ``le`` and more than the next smaller edge."""

    __tablename__ = "measure_sums"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    labels: Mapped[str] = mapped_column(String(_MOST_LABEL_CHARACTERS), primary_key=True)
    """JSON list of the values, in the order of the measure's labels."""
    le: Mapped[str] = mapped_column(String(32), primary_key=True)
    """Upper edge as it was when this was observed; so edges may change from one version to the next."""
    count: Mapped[int] = mapped_column(BigInteger)
    total: Mapped[float] = mapped_column(Double)
    """Sum of the observed values."""


_TABLE: Any = MeasureSum.__table__


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something that is observed: a histogram, or with no edges a counter, of the sum of the values.

    Args:
        name: As in /metrics; of a counter without ``_total``.
        about: What is observed, and in which unit.
        labels: Names of the labels. Their values must be few: never ids, prompts or anything that callers choose.
        edges: Upper edges of the buckets, rising; the last bucket has none.
    """

    name: str
    about: str
    labels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()

    def le(self, value: float) -> str:
        """The upper edge of the bucket of a value, as it is stored."""
        place = bisect.bisect_left(self.edges, value)
        return repr(float(self.edges[place])) if place < len(self.edges) else "+Inf"


@dataclass(frozen=True)
class Observation:
    """One observed value, with the values of the measure's labels."""

    measure: Measure
    labels: tuple[str, ...]
    value: float = 1.0


@dataclass
class Sums:
    """What was observed with the same labels: number and sum of values by upper edge."""

    counts: dict[str, int] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, le: str, count: int, total: float) -> None:
        """Add observations of one bucket."""
        self.counts[le] = self.counts.get(le, 0) + count
        self.totals[le] = self.totals.get(le, 0.0) + total

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts.values())

    @property
    def total(self) -> float:
        """Sum of the observed values."""
        return sum(self.totals.values())

    def cumulative(self, measure: Measure) -> list[tuple[str, float]]:
        """(upper edge, observations up to it) for each bucket of a measure, the one without an edge included."""
        at = [(float(le), count) for le, count in self.counts.items()]
        buckets = [(repr(float(edge)), float(sum(count for le, count in at if le <= edge))) for edge in measure.edges]
        return [*buckets, ("+Inf", float(self.count))]


Key = tuple[str, tuple[str, ...]]
"""Name of a measure, and values of its labels."""


def add_observations(connection: Connection, observations: Iterable[Observation]) -> None:
    """Count what was observed, in the caller's transaction."""
    sums: dict[Key, Sums] = {}
    for one in observations:
        sums.setdefault((one.measure.name, one.labels), Sums()).add(one.measure.le(one.value), 1, one.value)
    add_sums(connection, sums)


def add_sums(connection: Connection, sums: Mapping[Key, Sums]) -> None:
    """Add to what was observed, in the caller's transaction."""
    rows = [
        {"name": name, "labels": json.dumps(labels), "le": le, "count": count, "total": of.totals[le]}
        for (name, labels), of in sums.items()
        for le, count in of.counts.items()
    ]
    # In one order: two transactions that lock the same rows then wait for each other, and do not deadlock.
    rows.sort(key=lambda row: (row["name"], row["labels"], row["le"]))
    if rows:
        connection.execute(_addition(connection.dialect.name), rows)


@cache
def _addition(dialect_name: str) -> Any:
    """Put together once: that costs more than running it."""
    statement: Any = (sqlite if dialect_name == "sqlite" else postgresql).insert(_TABLE)
    raised = {name: _TABLE.c[name] + statement.excluded[name] for name in ("count", "total")}
    return statement.on_conflict_do_update(index_elements=["name", "labels", "le"], set_=raised)


def read_measures(database: Database, measures: Sequence[Measure]) -> dict[str, dict[tuple[str, ...], Sums]]:
    """What was observed since the beginning, by name of measure and values of its labels; one consistent view."""
    found: dict[str, dict[tuple[str, ...], Sums]] = {measure.name: {} for measure in measures}
    query = select(MeasureSum.__table__).where(MeasureSum.name.in_(list(found))).order_by(MeasureSum.labels)
    with database.read() as connection:
        for row in connection.execute(query):
            labels = tuple(json.loads(row.labels))
            found[row.name].setdefault(labels, Sums()).add(row.le, row._mapping["count"], row.total)
    return found
