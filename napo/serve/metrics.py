"""Counters of a service as OpenMetrics text (https://prometheus.io/docs/specs/om/open_metrics_spec/)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from napo.serve.lru import LRUCache

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        total, lines = 0, []
        for bound, count in zip([*map(float, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_count {total}", f"{name}_sum {self.sum}"]


class Metrics:
    """All that `/metrics` shows. Used in the event loop's thread alone."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        self.answers = {"model": 0, "popularity": 0}
        self.in_flight = 0
        self.seconds = Histogram(SECONDS)
        self.batch_size = Histogram(SIZES)
        self.batch_seconds = Histogram(SECONDS)

    def answered(self, path: str, status: int, seconds: float) -> None:
        self.requests[path, status] = self.requests.get((path, status), 0) + 1
        if path == "/recommend":
            self.seconds.observe(seconds)

    def computed(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def recommended(self, model: str, by: str) -> None:
        """``by``: the ``model`` of the service, or what is popular."""
        self.answers["model" if by == model else "popularity"] += 1

    def text(
        self, *, waiting: int, kept: LRUCache[Any], started: float, healthy: bool, facts: Mapping[str, str]
    ) -> str:
        """``facts``: what ranks, and of which version it is."""
        lines = [
            "# TYPE napo_requests counter",
            "# HELP napo_requests Answered requests by path and status.",
        ]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'napo_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += ["# TYPE napo_lookups counter", "# HELP napo_lookups Requests whose answer was kept, and others."]
        lines += [f'napo_lookups_total{{kept="yes"}} {kept.hits}', f'napo_lookups_total{{kept="no"}} {kept.misses}']
        lines += ["# TYPE napo_answers counter", "# HELP napo_answers Answers by the model, and by popularity alone."]
        lines += [f'napo_answers_total{{by="{by}"}} {count}' for by, count in self.answers.items()]
        for name, value, what in (
            ("napo_start_time_seconds", started, "When the service started, in seconds since 1970."),
            ("napo_healthy", int(healthy), "1 where requests are answered, as /health says."),
            ("napo_answers_kept", len(kept), "Answers that are kept."),
            ("napo_requests_in_flight", self.in_flight, "Requests that are not answered yet."),
            ("napo_requests_waiting", waiting, "Requests that wait for the next pass."),
        ):
            lines += [f"# TYPE {name} gauge", f"# HELP {name} {what}", f"{name} {value}"]
        for name, histogram, unit, what in (
            ("napo_request_seconds", self.seconds, "seconds", "Time to answer a request for recommendations."),
            ("napo_batch_size", self.batch_size, "", "Requests that were computed in one pass."),
            ("napo_batch_seconds", self.batch_seconds, "seconds", "Time of one pass."),
        ):
            lines += [f"# TYPE {name} histogram", *([f"# UNIT {name} {unit}"] if unit else [])]
            lines += [f"# HELP {name} {what}", *histogram.lines(name)]
        labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in facts.items())
        lines += ["# TYPE napo_model info", "# HELP napo_model What ranks.", f"napo_model_info{{{labels}}} 1"]
        return "\n".join([*lines, "# EOF"]) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
