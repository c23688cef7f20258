"""How often a gate may be wrong about one champion: the error of each look, and an interval that is valid at any error.

A candidate that is no better passes a gate by luck at last, if it, or others like it, are evaluated again and again: at 2.5 % a
look, 50 looks let one in 72 times of 100. So all looks at one champion share a budget, and the k-th may spend

    alpha_k = budget / (k (k + 1))

of it. These add up to the budget for ever: k looks have spent k / (k + 1) of it. By the union bound the probability that any look
passes a candidate that is no better is at most the budget, however the looks depend on one another and whenever anybody stops.
They do depend: they share prompts, and often the candidate. That is why errors are added here, and no evidence is multiplied from
look to look (Ramdas 2023, arXiv 2210.01948): that needs looks that are independent of those before, and one hypothesis for all of
them, where each challenger is one of its own. Of the usual sequences this one begins with half of the budget: at 5 %, 2.5 % at the
first look, which is the lower end of an interval at 95 %.

A bootstrap's percentile is right in the limit of many prompts, and at an error of 0.0001 it lies beyond what 2000 resamples show.
The interval here is exact at every size: see `win_rate_low`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from components.rlhf.statistics import UNKNOWN, Estimate

TIES_SHARE = 0.05  # of the error, each, for the share of ties being smaller or larger than it looks

Floats = NDArray[np.float64]


class Look(NamedTuple):
    """One evaluation against a champion.

    Fields:
        number: from 1, in the order in which they began.
        alpha: error that it may spend, one-sided; 0 if nothing is left.
        spent: by it and by those before.
        budget: for all of them.
    """

    number: int
    alpha: float
    spent: float
    budget: float


def next_look(budget: float, spent: ArrayLike) -> Look:
    """The look after those that spent these errors.

    Args:
        budget: the error for all looks, in (0, 1). It may have been another before: what is spent stays spent.
        spent: alpha of each look so far.
    """
    before = np.asarray(spent, dtype=np.float64)
    number, total = before.size + 1, float(before.sum())
    alpha = max(0.0, min(budget / (number * (number + 1)), budget - total))
    return Look(number, alpha, min(total + alpha, budget) if total <= budget else total, budget)


def win_rate_interval(outcomes: ArrayLike, alpha: float) -> Estimate:
    """Share of prompts won, ties half, with ends that are each wrong with probability `alpha` at most.

    Args:
        outcomes: one number per prompt: 1 won, 0.5 tied, 0 lost. None: unknown; one that is not finite: unknown.
        alpha: in (0, 0.5); 0, when the budget is spent, knows nothing: unknown.

    Raises:
        ValueError: an outcome is none of 0, 0.5 and 1.
    """
    items = np.asarray(outcomes, dtype=np.float64)
    if items.size == 0 or not np.isfinite(items).all() or not 0 < alpha < 0.5:
        return UNKNOWN
    won, tied, lost = (int((items == each).sum()) for each in (1.0, 0.5, 0.0))
    if won + tied + lost != items.size:
        raise ValueError(f"outcomes are 0, 0.5 or 1, not {items[~np.isin(items, (0.0, 0.5, 1.0))][0]}")
    low, high = win_rate_low(won, tied, lost, alpha), 1 - win_rate_low(lost, tied, won, alpha)
    return Estimate(float(items.mean()), float(low), float(high))


def win_rate_low(won: ArrayLike, tied: ArrayLike, lost: ArrayLike, alpha: ArrayLike) -> Floats:
    """Lower end of the win rate, which is above the true one with probability `alpha` at most, at any number of prompts.

    With a share t of ties, and a share w of the decided prompts won, the win rate is 1/2 + (1 - t)(w - 1/2). Both are shares of
    independent prompts, so each has the exact bound of Clopper and Pearson (1934): w, given how many are decided, at 90 % of
    the error, and t on either side at 5 %. Against a threshold of 1/2 it is the exact sign test, in which ties say nothing.

    Args:
        won, tied, lost: numbers of prompts, of any common shape; at least one prompt each.
        alpha: error, in (0, 0.5).
    """
    from scipy.stats import beta

    wins, ties, losses, error = (np.asarray(each, dtype=np.float64) for each in (won, tied, lost, alpha))
    decided = wins + losses

    def below(hits: Floats, others: Floats, share_of_error: float) -> Floats:
        quantile = beta.ppf(share_of_error * error, np.maximum(hits, 1), others + 1)
        return np.where(hits > 0, quantile, 0.0)

    share = below(wins, losses, 1 - 2 * TIES_SHARE)
    fewest = below(ties, decided, TIES_SHARE)
    most = 1 - below(decided, ties, TIES_SHARE)
    return np.asarray(0.5 + (1 - np.where(share > 0.5, most, fewest)) * (share - 0.5), dtype=np.float64)
