"""Every two completions of a ranking, as columns; and what repeated comparisons show: decisions both ways, and cycles.

P pairs of completions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from components.rlhf.agreement import Votes
from components.rlhf.near_duplicates import mix
from components.validate_data.rows import Hashes, Ints
from components.validate_data.spill import NOBODY, Part


class Pairs(NamedTuple):
    """P pairs of different completions i < j, each of one ranking.

    Fields:
        row_P: of the snapshot.
        prompt_P: number of the prompt within the part, from 0, in the order of the prompts' hashes.
        task_P: hash of prompt and criterion.
        rater_P, source_P, size_P: of the ranking, with its number of completions.
        shown_first_P: whether i was the first of all.
        margin_P: rank of j minus rank of i: above 0 where i is preferred, 0 for a tie.
        texts_P2, lengths_P2, refuses_P2: hashes of i and j, lengths in characters, whether they refuse.
    """

    row_P: Ints
    prompt_P: Ints
    task_P: Hashes
    rater_P: Ints
    source_P: Ints
    size_P: Ints
    shown_first_P: NDArray[np.bool_]
    margin_P: Ints
    texts_P2: Hashes
    lengths_P2: Ints
    refuses_P2: NDArray[np.bool_]

    def of(self, places: NDArray[Any]) -> Pairs:
        return Pairs(*(each[places] for each in self))

    def votes(self) -> Votes:
        """The pairs as judgements: an item's first completion is the one with the lower hash."""
        low, high = self.texts_P2.min(axis=1), self.texts_P2.max(axis=1)
        turned = self.texts_P2[:, 0] > self.texts_P2[:, 1]
        item = mix(mix(self.task_P ^ low) + high)
        return Votes(item, self.prompt_P, self.rater_P, np.sign(np.where(turned, -self.margin_P, self.margin_P)))


def pairs_of(part: Part) -> Pairs:
    """The pairs of a part whose rankings are all valid."""
    rows, completions = part
    _, prompt = np.unique(rows["prompt"], return_inverse=True)
    starts = np.cumsum(rows["size"]) - rows["size"]
    ranking, ones, others = [np.empty(0, dtype=int)], [np.empty(0, dtype=int)], [np.empty(0, dtype=int)]
    for size in np.unique(rows["size"]):
        i, j = np.triu_indices(int(size), 1)
        chosen = np.flatnonzero(rows["size"] == size)
        ranking.append(np.repeat(chosen, len(i)))
        ones.append((starts[chosen][:, None] + i).ravel())
        others.append((starts[chosen][:, None] + j).ravel())
    of, i, j = (np.concatenate(each) for each in (ranking, ones, others))
    both = np.stack([i, j], axis=1)
    found = Pairs(
        row_P=rows["row"][of],
        prompt_P=prompt[of],
        task_P=rows["task"][of],
        rater_P=rows["rater"][of].astype(np.int64),
        source_P=rows["source"][of].astype(np.int64),
        size_P=rows["size"][of].astype(np.int64),
        shown_first_P=i == starts[of],
        margin_P=completions["rank"][j].astype(np.int64) - completions["rank"][i],
        texts_P2=completions["text"][both],
        lengths_P2=completions["length"][both].astype(np.int64),
        refuses_P2=completions["refuses"][both],
    )
    return found.of(found.texts_P2[:, 0] != found.texts_P2[:, 1])


class Decisions(NamedTuple):
    """Comparisons that were decided at least twice.

    Fields:
        first_D: place of one vote on each.
        both_ways_D: whether somebody decided it the other way.
        against: places of two opposite votes, for each that was decided both ways.
    """

    first_D: Ints
    both_ways_D: NDArray[np.bool_]
    against: Ints


def repeated_decisions(comparison_P: Hashes, verdict_P: Ints) -> Decisions:
    """Of strict verdicts (1 or -1) on comparisons, those that were given more than once."""
    order = np.lexsort((verdict_P, comparison_P))
    _, first, counts = np.unique(comparison_P[order], return_index=True, return_counts=True)
    last = first + counts - 1
    both = verdict_P[order[first]] != verdict_P[order[last]]
    against = np.stack([order[first[both]], order[last[both]]], axis=1)
    return Decisions(order[first[counts > 1]], both[counts > 1], against)


class Orderings(NamedTuple):
    """Tasks of which one known rater made two rankings or more, over three completions or more.

    Fields:
        place_G: of one pair of each.
        circular_G: whether its preferences go round in a circle.
        rows_G2: two of its rankings.
    """

    place_G: Ints
    circular_G: NDArray[np.bool_]
    rows_G2: Ints


def repeated_orderings(pairs: Pairs) -> Orderings:
    """Finds cycles such as A before B, B before C, C before A: strongly connected completions, three at least.

    A pair that the rater decided as often one way as the other is a contradiction and closes no cycle; a tie does neither.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    known = np.flatnonzero(pairs.rater_P != NOBODY)
    if not len(known):
        return Orderings(known, np.zeros(0, dtype=bool), np.zeros((0, 2), dtype=int))
    by_rater = mix(pairs.task_P[known] ^ mix(pairs.rater_P[known].astype(np.uint64)))
    _, first, group = np.unique(by_rater, return_index=True, return_inverse=True)
    rows = np.stack([np.full(len(first), np.iinfo(np.int64).max), np.full(len(first), -1)], axis=1)
    np.minimum.at(rows[:, 0], group, pairs.row_P[known])
    np.maximum.at(rows[:, 1], group, pairs.row_P[known])

    texts = mix(pairs.texts_P2[known] + mix(group.astype(np.uint64))[:, None])
    _, node = np.unique(texts, return_inverse=True)
    node = node.reshape(-1, 2)
    nodes = int(node.max()) + 1
    group_of_node = np.empty(nodes, dtype=np.int64)
    group_of_node[node] = group[:, None]
    edge, inverse = np.unique(node.min(axis=1) * nodes + node.max(axis=1), return_inverse=True)
    forward = np.sign(np.where(node[:, 0] < node[:, 1], pairs.margin_P[known], -pairs.margin_P[known]))
    net = np.bincount(inverse, weights=forward)
    low, high = edge // nodes, edge % nodes
    better, worse = np.where(net > 0, (low, high), (high, low))[:, net != 0]
    graph = coo_array((np.ones(len(better)), (better, worse)), shape=(nodes, nodes))
    _, component = connected_components(graph, connection="strong")
    circular = np.zeros(len(first), dtype=bool)
    circular[group_of_node[np.bincount(component)[component] >= 3]] = True
    chosen = (rows[:, 0] < rows[:, 1]) & (np.bincount(group_of_node, minlength=len(first)) >= 3)
    return Orderings(known[first[chosen]], circular[chosen], rows[chosen])
