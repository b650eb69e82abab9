"""An exhaustive search by the actors of a Ray cluster: each scans some of the shards, and the best of all are merged.

The rows of one moment are searched: actors are told which shards and which removed examples, and refuse others. A part
whose actor died is searched again by another one; an answer of some of the parts is never given.
"""

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from rapidindex.cluster import connect, import_ray
from rapidindex.errors import RapidIndexError, ResourceError, StoreError
from rapidindex.search.exact import SearchResult, checked_queries, exact_search, padding, top
from rapidindex.store import Rows, Store

_TRIES = 3
"""Actors that search a part, one after another, until the search is given up."""
_SECONDS = 600.0
"""Seconds that a part may take."""


class _Searcher:
    """The part of an actor."""

    def __init__(self, index: str, level: str, shards: list[tuple[str, str, int]], removed: frozenset[str]) -> None:
        self._place, self._shards, self._removed = (index, level), shards, removed
        self._rows: Rows | None = None

    def search(self, queries: np.ndarray, k: int, largest: bool) -> Any:
        """Return the best scores, and their rows counted from the first of the part; an expected error as a value."""
        try:
            found = exact_search(self._part(), np.array(queries), k, largest=largest, threads=os.cpu_count())
            return found.scores, found.rows
        except RapidIndexError as error:
            return error

    def _part(self) -> Rows:
        if self._rows is None:
            index, level = self._place
            rows = Store.open(index).rows(level)
            names = [shard[0] for shard in rows.shards]
            first = names.index(self._shards[0][0]) if self._shards[0][0] in names else 0
            last = first + len(self._shards)
            if rows.shards[first:last] != self._shards:
                raise StoreError(
                    f"{socket.gethostname()} sees other rows at {index} than the search began with.",
                    hint="The index must lie on storage that all nodes have at the same path; then ask again.",
                )
            self._rows = rows.part(first, last, self._removed)
        return self._rows


class SpreadSearch:
    """The rows of one level, in parts that the nodes of the Ray cluster at `address` scan: one each.

    Raises as `cluster.connect` does.
    """

    def __init__(self, index: str, rows: Rows, address: str) -> None:
        connect(address)
        self._ray, self.rows, self._index = import_ray(), rows, index
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        self._class = self._ray.remote(max_restarts=0, max_task_retries=0, num_cpus=0, scheduling_strategy="SPREAD")(
            _Searcher
        )
        self._bounds = _bounds([shard[2] for shard in rows.shards], max(1, len(nodes)))
        self._actors: list[Any] = [None] * len(self._bounds)
        self._turn = threading.Lock()  # threads of a page share the actors

    def search(self, queries: np.ndarray, k: int, *, largest: bool = True) -> SearchResult:
        """Find what `exact_search` finds, without the summaries of all scores.

        ResourceError where a part cannot be searched: an answer of the other parts would be another one.
        """
        started = time.perf_counter()
        queries = checked_queries(queries, self.rows.K, k)
        with self._turn:
            answers = self._answers(queries, k, largest)
        live = int(np.count_nonzero(self.rows.live_mask))
        scores, numbers = self._merge(answers, len(queries), k, largest)
        return SearchResult(scores, numbers, live, largest, "exact", 1.0, time.perf_counter() - started, 0.0, None)

    def _answers(self, queries: np.ndarray, k: int, largest: bool) -> list[Any]:
        """Return what each part found."""
        sent = self._ray.put(queries)
        answers: dict[int, Any] = {}
        for tries in range(1, _TRIES + 1):
            calls = {
                part: self._call(part, sent, k, largest) for part in range(len(self._bounds)) if part not in answers
            }
            for part, call in calls.items():
                try:
                    answers[part] = self._ray.get(call, timeout=_SECONDS)
                except self._ray.exceptions.RayError as error:
                    self._drop(part)
                    if tries == _TRIES:
                        raise self._unanswered(part, error) from error
        errors = [answer for answer in answers.values() if isinstance(answer, RapidIndexError)]
        if errors:
            raise errors[0]
        return [answers[part] for part in range(len(self._bounds))]

    def _call(self, part: int, queries: Any, k: int, largest: bool) -> Any:
        if self._actors[part] is None:
            first, last, _ = self._bounds[part]
            shards = self.rows.shards[first:last]
            self._actors[part] = self._class.remote(self._index, self.rows.level, shards, self.rows.removed)
        return self._actors[part].search.remote(queries, k, largest)

    def _unanswered(self, part: int, error: Exception) -> ResourceError:
        why = str(error).strip().partition("\n")[0]
        return ResourceError(
            f"Part {part + 1} of {len(self._bounds)} of {self._index} could not be searched, {_TRIES} times: {why}",
            hint="Ask without --ray, or with more memory for each node.",
        )

    def _drop(self, part: int) -> None:
        with suppress(Exception):
            self._ray.kill(self._actors[part])
        self._actors[part] = None

    def _merge(
        self, answers: Sequence[tuple[np.ndarray, np.ndarray]], queries: int, k: int, largest: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best of all parts; of equal scores the lower row, which is that of the earlier part, first."""
        scores, numbers = padding(queries, k, largest)
        firsts = [first_row for _, _, first_row in self._bounds]
        for query in range(queries):
            found = [(part[0][query], part[1][query]) for part in answers]
            all_rows = np.concatenate(
                [np.where(rows < 0, -1, rows + first) for (_, rows), first in zip(found, firsts, strict=True)]
            )
            all_scores = np.concatenate([part_scores for part_scores, _ in found])[all_rows >= 0]
            all_rows = all_rows[all_rows >= 0]
            best = top(all_scores, k, largest)
            scores[query, : len(best)], numbers[query, : len(best)] = all_scores[best], all_rows[best]
        return scores, numbers


def _bounds(rows: Sequence[int], parts: int) -> list[tuple[int, int, int]]:
    """Return (first shard, last shard, first row) of at most `parts` parts of like many rows, none of them empty."""
    ends = np.cumsum([0, *rows])
    cuts = np.unique(np.searchsorted(ends, np.linspace(0, ends[-1], parts + 1)[1:-1], side="left"))
    edges = [0, *(int(cut) for cut in cuts if 0 < cut < len(rows)), len(rows)]
    return [(first, last, int(ends[first])) for first, last in zip(edges, edges[1:], strict=False)]
