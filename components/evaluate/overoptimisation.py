"""Over-optimisation (Gao 2022, arXiv 2210.10760): how reward and judge move with the distance from SFT, and how far they part.

Both are measured in standard deviations of their own scores of SFT's answers, so that two reward models can be compared at all.

The curve is of training and PPO's alone: DPO optimises no reward model, and its record has no rewards. The gap at the chosen policy
needs no curve: it comes from the evaluation's own answers, whatever made the policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from components.evaluate.measures import Answer, Measures
from components.rlhf.plots import lines
from components.rlhf.report_page import Cell, Section, Table
from components.rlhf.statistics import UNKNOWN, Estimate, as_json

RESAMPLES_AT_ONCE = 100
LEAST_UPDATES = 6  # twice the numbers that are fitted
CURVES = {"reward": "reward", "judge": "judge_reward"}  # scorer: its key in training.jsonl
NAMES = {"reward": "reward model", "judge": "judge"}

Floats = NDArray[np.float64]


class Fit(NamedTuple):
    """R(d) = start + d (alpha - beta log d), with d the root of the KL to SFT, in √nats.

    Fields:
        start: reward at d = 0.
        peak: the d at which R is highest; NaN where beta is not positive, so that it has no highest place.
        error: root mean square of what the fit leaves.
        updates: how many were fitted.
    """

    start: float
    alpha: float
    beta: float
    peak: float
    error: float
    updates: int

    def at(self, d: ArrayLike) -> Floats:
        """R at each d >= 0."""
        return np.asarray(_columns(np.asarray(d, dtype=np.float64)) @ np.array([self.start, self.alpha, self.beta]))


def fit_gao(root_kl: ArrayLike, reward: ArrayLike) -> Fit | None:
    """Gao's form for reinforcement learning (section 3.1), by least squares; it is linear in what is fitted, so in closed form.

    Deviation: Gao sets the reward at d = 0 to 0. Here it is fitted, because it is known from one noisy batch only.

    Args:
        root_kl: √KL of each update, in √nats; below 0 it is not known.
        reward: mean of the update.

    Returns:
        None where fewer than `LEAST_UPDATES` updates are finite, or they do not tell the three numbers apart.
    """
    d, r = np.asarray(root_kl, dtype=np.float64), np.asarray(reward, dtype=np.float64)
    known = np.isfinite(d) & np.isfinite(r) & (d >= 0)
    d, r = d[known], r[known]
    if d.size < LEAST_UPDATES:
        return None
    columns = _columns(d)
    found, _, rank, _ = np.linalg.lstsq(columns, r)
    if rank < columns.shape[1]:
        return None
    start, alpha, beta = (float(each) for each in found)
    exponent = alpha / beta - 1 if beta > 0 else math.nan
    peak = math.exp(exponent) if exponent < 700 else math.nan
    return Fit(start, alpha, beta, peak, float(np.sqrt(np.mean((columns @ found - r) ** 2))), int(d.size))


def _columns(d: Floats) -> Floats:
    """What start, alpha and beta are multiplied with; d log d is 0 at 0. [N, 3]"""
    return np.stack([np.ones_like(d), d, -d * np.log(np.where(d > 0, d, 1.0))], axis=-1)


def measure_gap(candidate: Sequence[Answer], sft: Sequence[Answer], seed: int, resamples: int) -> Measures:
    """Gain of the candidate over SFT by the reward model and by the judge, and by how much the reward model claims more.

    In standard deviations of each one's scores of SFT's answers. The intervals are percentiles of a bootstrap over prompts, in
    which the deviations are drawn anew, too. A score that is not finite, or SFT's answers all scored alike: null, which fails the
    gate.
    """
    ours, theirs = (
        np.array([[answer.scores[scorer] for scorer in CURVES] for answer in given], dtype=np.float64).reshape(-1, len(CURVES))
        for given in (candidate, sft)
    )
    found = dict.fromkeys(("reward_gain", "judge_gain", "overoptimisation_gap"), UNKNOWN)
    if len(ours) > 1 and np.isfinite(ours).all() and np.isfinite(theirs).all():
        value = _gains(ours, theirs, np.arange(len(ours))[None])[0]
        generator = np.random.default_rng(seed)
        chunks = [min(RESAMPLES_AT_ONCE, resamples - first) for first in range(0, resamples, RESAMPLES_AT_ONCE)]
        drawn = np.concatenate([_gains(ours, theirs, generator.integers(0, len(ours), (each, len(ours)))) for each in chunks])
        if np.isfinite(value).all() and np.isfinite(drawn).all():
            low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
            found = {name: Estimate(float(value[i]), float(low[i]), float(high[i])) for i, name in enumerate(found)}
    return {name: as_json(estimate) for name, estimate in found.items()}


def _gains(ours_NS: Floats, theirs_NS: Floats, rows_RN: NDArray[np.int64]) -> Floats:
    """Gain by the reward model, by the judge, and the first less the second, of R choices of prompts. [R, 3]"""
    deviations_RS = theirs_NS[rows_RN].std(axis=1)
    alike = deviations_RS <= 1e-9 * np.abs(theirs_NS).max(axis=0)
    gains_RS = (ours_NS - theirs_NS)[rows_RN].mean(axis=1) / np.where(alike, math.nan, deviations_RS)
    return np.concatenate([gains_RS, gains_RS[:, :1] - gains_RS[:, 1:]], axis=1)


def fit_training(training: Sequence[Mapping[str, Any]], deviations: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The fits of a record of PPO's, as plain JSON: {"reward" and "judge": `Fit`}, in the deviations' unit; {} where there is none.

    Args:
        training: lines of training.jsonl.
        deviations: {scorer: standard deviation of its scores of SFT's answers}.
    """
    d = _root_kl(training)
    found = {}
    for scorer, key in CURVES.items():
        scale = deviations.get(scorer, math.nan)
        fit = fit_gao(d, _numbers(training, key) / scale) if scale > 0 else None
        if fit:
            found[scorer] = {name: value if math.isfinite(value) else None for name, value in fit._asdict().items()}
    return found


def deviations_of(sft: Sequence[Answer]) -> dict[str, float]:
    """Standard deviation of each scorer's scores of SFT's answers."""
    return {scorer: float(np.std([answer.scores[scorer] for answer in sft])) for scorer in CURVES}


def overoptimisation_section(evaluation: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> Section:
    """Gains and gap; where there is a curve, its fits with the chosen update marked."""
    measures = evaluation["measures"]
    gains: list[list[Cell]] = [
        [said, *(measures[name][end] for end in ("value", "low", "high"))]
        for name, said in (
            ("reward_gain", "gain by the reward model"),
            ("judge_gain", "gain by the judge"),
            ("overoptimisation_gap", "gap: what the reward model claims more"),
        )
    ]
    paragraphs = [
        "How much higher the candidate's answers score than SFT's to the same prompts, in standard deviations of each scorer's "
        "scores of SFT's answers. The judge never was optimised: a gain that it does not see may be an error of the reward model "
        "(Gao 2022)."
    ]
    tables = [Table("Gain over SFT", ["", "value", "low", "high"], gains)]
    fits, deviations = evaluation["overoptimisation"]["fits"], evaluation["overoptimisation"]["deviations"]
    figures: list[Markup] = []
    chosen = _chosen_root_kl(training)
    if fits:
        paragraphs.append(
            "The curves are R(d) = R(0) + d (α - β log d) with d = √KL to SFT, fitted to every update of PPO by least squares; "
            "R(0) is taken off. Beyond the peak of the judge's curve more optimisation makes answers worse."
        )
        rows: list[list[Cell]] = [
            [NAMES[scorer], fit["alpha"], fit["beta"], _peak(fit["peak"], training), fit["error"], fit["updates"], chosen]
            for scorer, fit in fits.items()
        ]
        columns = ["", "α", "β", "peak, √nats", "error of the fit", "updates", "chosen update at, √nats"]
        tables.append(Table("Gao's form", columns, rows))
        figures.append(_plot(training, fits, deviations, chosen))
    else:
        paragraphs.append(
            "There is no curve to fit: PPO's record is missing or too short, or the candidate was made without a reward."
        )
    return Section("Over-optimisation", paragraphs, tables, figures)


def _peak(peak: float | None, training: Sequence[Mapping[str, Any]]) -> Cell:
    """The peak where it was measured; a fit that goes on rising says nothing about a place where PPO never was."""
    farthest = float(np.nanmax(_root_kl(training)))
    return peak if peak is None or peak <= farthest else f"beyond {farthest:.3g}, not reached"


def _plot(
    training: Sequence[Mapping[str, Any]], fits: Mapping[str, Any], deviations: Mapping[str, float], chosen: float | None
) -> Markup:
    d = _root_kl(training)
    grid = np.linspace(0, float(np.nanmax(d)), 60)
    series: dict[str, tuple[list[float | None], list[float | None]]] = {}
    for scorer, each in fits.items():
        fit = Fit(**{**each, "peak": math.nan})
        points = _numbers(training, CURVES[scorer]) / deviations[scorer] - fit.start
        series[NAMES[scorer]] = (d.tolist(), points.tolist())
        series[f"{NAMES[scorer]}, fitted"] = (grid.tolist(), (fit.at(grid) - fit.start).tolist())
    vertical = {} if chosen is None else {"chosen update": chosen}
    return lines(
        "Gain against √KL, with Gao's form", "√KL to SFT, √nats", "gain, deviations", series, join=False, vertical=vertical
    )


def _chosen_root_kl(training: Sequence[Mapping[str, Any]]) -> float | None:
    chosen = [row for row in training if row.get("chosen") is True]
    value = float(_root_kl(chosen[-1:])[0]) if chosen else math.nan
    return value if math.isfinite(value) else None


def _root_kl(training: Sequence[Mapping[str, Any]]) -> Floats:
    return np.sqrt(np.maximum(0.0, _numbers(training, "kl_reference")))  # an estimate of a KL near 0 may be negative


def _numbers(training: Sequence[Mapping[str, Any]], key: str) -> Floats:
    """A column of the record; NaN for what is no number."""
    values = (row.get(key) for row in training)
    return np.array([float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else math.nan for x in values])
