"""Estimates against numbers worked by hand, exact enumeration, and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from components.rlhf import statistics


def exact_bootstrap(items: list[float]) -> tuple[float, float]:
    """Percentiles of the mean over every one of the n^n resamples."""
    means = [sum(draw) / len(items) for draw in itertools.product(items, repeat=len(items))]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def test_wilson_interval_is_the_published_one() -> None:
    # 8 of 10: centre (0.8 + 3.8415/20) / 1.38415 = 0.71674, half width 1.95996/1.38415 * sqrt(0.016 + 3.8415/400) = 0.22658
    assert statistics.wilson_interval(8, 10) == pytest.approx((0.8, 0.49016, 0.94332), abs=1e-5)
    # 0 of 10: high = z^2 / (n + z^2) = 3.8415 / 13.8415
    assert statistics.wilson_interval(0, 10) == pytest.approx((0.0, 0.0, 0.27753), abs=1e-5)
    assert statistics.wilson_interval(10, 10) == pytest.approx((1.0, 0.72247, 1.0), abs=1e-5)


def test_nothing_to_estimate_from_is_nan_and_not_zero() -> None:
    for estimate in (
        statistics.wilson_interval(0, 0),
        statistics.win_rate([], 0),
        statistics.length_controlled_win_rate([], [], 0),
        statistics.cluster_share([], [], 0),
        statistics.cluster_share([0.0], [0.0], 0),
        statistics.mean([], 0),
        statistics.mean([1.0, math.nan], 0),
        statistics.mean([1.0, math.inf], 0),
    ):
        assert all(math.isnan(value) for value in estimate)


def test_line_38_win_rate_counts_ties_as_half_and_has_the_exact_bootstrap_interval() -> None:
    wins = [1.0, 1.0, 0.5, 0.0, 1.0, 0.5]
    estimate = statistics.win_rate(wins, seed=3, resamples=20_000)
    low, high = exact_bootstrap(wins)
    assert estimate.value == pytest.approx(4 / 6)
    assert estimate.low == pytest.approx(low, abs=1 / 24)  # 20,000 draws of a distribution in steps of 1/12
    assert estimate.high == pytest.approx(high, abs=1 / 24)


def test_win_rate_depends_on_the_seed_alone() -> None:
    wins = np.random.default_rng(0).integers(0, 2, 101).astype(float)
    assert statistics.win_rate(wins, seed=1) == statistics.win_rate(wins, seed=1)
    assert statistics.win_rate(wins, seed=1) == statistics.win_rate(wins.tolist(), seed=1)
    values = np.random.default_rng(0).normal(size=101)
    assert statistics.mean(values, seed=1)[1:] != statistics.mean(values, seed=2)[1:]


def test_win_rate_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        estimate = statistics.win_rate((generator.random(120) < 0.6).astype(float), seed=trial, resamples=400)
        covered += estimate.low <= 0.6 <= estimate.high
    assert 0.91 <= covered / 300 <= 0.985


def test_few_equal_outcomes_do_not_give_certainty() -> None:
    assert statistics.win_rate([1.0, 1.0, 1.0], seed=0) == pytest.approx(statistics.wilson_interval(3, 3))
    assert statistics.win_rate([0.5] * 4, seed=0) == pytest.approx(statistics.wilson_interval(2, 4))


@pytest.mark.parametrize("wrong", [0.7, -1.0, math.nan])
def test_win_rate_refuses_what_is_not_an_outcome(wrong: float) -> None:
    with pytest.raises(ValueError, match=str(wrong)):
        statistics.win_rate([1.0, wrong], seed=0)


def test_pairs_of_one_cluster_count_as_one_observation() -> None:
    # Six pairs per ranking that are all right or all wrong carry no more than one outcome per ranking.
    outcomes = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    clustered = statistics.cluster_share([6 * each for each in outcomes], [6] * 10, seed=4)
    independent = statistics.win_rate(list(itertools.chain(*([each] * 6 for each in outcomes))), seed=4)
    assert clustered == pytest.approx(statistics.win_rate(outcomes, seed=4))
    assert clustered.high - clustered.low > 2 * (independent.high - independent.low)


def test_cluster_share_weighs_clusters_by_their_trials() -> None:
    assert statistics.cluster_share([6, 0, 5], [6, 1, 0], seed=0).value == pytest.approx(6 / 7)  # the last has no trials


def test_chunks_of_a_large_bootstrap_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=50)
    whole = statistics.mean(values, seed=9, resamples=200)
    monkeypatch.setattr(statistics, "CELLS_PER_CHUNK", 50 * 7)
    assert statistics.mean(values, seed=9, resamples=200) == pytest.approx(whole)


def test_mean_has_the_interval_of_the_central_limit_theorem() -> None:
    values = np.random.default_rng(2).normal(10.0, 2.0, 400)
    estimate = statistics.mean(values, seed=0)
    half = 1.96 * values.std() / 20
    assert estimate == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=0.03)


def test_line_38_length_control_removes_wins_that_are_only_length() -> None:
    # Longer by one: 90 % won; shorter by one: 10 % won. Then logit(p+) = a + b = -logit(p-) = -(a - b), so a = 0.
    wins = [1.0] * 675 + [0.0] * 75 + [1.0] * 25 + [0.0] * 225
    difference = [1.0] * 750 + [-1.0] * 250
    assert statistics.win_rate(wins, 0).value == pytest.approx(0.7)
    controlled = statistics.length_controlled_win_rate(wins, difference, 0, resamples=200)
    assert controlled.value == pytest.approx(0.5, abs=0.002)
    assert controlled.low < 0.5 < controlled.high


def test_length_control_solves_the_saturated_regression() -> None:
    # p+ = 0.8, p- = 0.5: a = (logit 0.8 + logit 0.5) / 2 = 0.6931, sigmoid(a) = 2/3. The unit of length does not matter.
    wins = [1.0] * 800 + [0.0] * 200 + [0.5] * 1000
    for unit in (1.0, 40.0):
        difference = [unit] * 1000 + [-unit] * 1000
        assert statistics.length_controlled_win_rate(wins, difference, 0, resamples=100).value == pytest.approx(2 / 3, abs=1e-3)


def test_length_control_without_any_difference_is_the_raw_rate() -> None:
    wins = [1.0] * 60 + [0.0] * 40
    controlled = statistics.length_controlled_win_rate(wins, [0.0] * 100, 0)
    assert controlled.value == pytest.approx(0.6, abs=1e-3)
    assert controlled == pytest.approx(statistics.win_rate(wins, 0), abs=0.01)


def test_length_control_survives_perfect_separation() -> None:
    estimate = statistics.length_controlled_win_rate([1.0] * 20 + [0.0] * 20, [5.0] * 20 + [-5.0] * 20, 0, resamples=200)
    assert estimate.value == pytest.approx(0.5, abs=1e-6)
    assert all(math.isfinite(value) for value in estimate)
    always = statistics.length_controlled_win_rate([1.0] * 20, list(range(20)), 0, resamples=200)
    assert 0.5 < always.low < always.value <= always.high == 1.0


def test_line_13_calibration_by_hand() -> None:
    # Bin [0.5, 0.75): 0.6 right, 0.7 wrong -> confidence 0.65, accuracy 0.5. Bin [0.75, 1]: 0.9, 1.0 right -> 0.95, 1.
    bins = statistics.reliability([0.6, 0.7, 0.9, 1.0], [1, 0, 1, 1], bins=2)
    assert [tuple(each) for each in bins] == [
        pytest.approx((0.5, 0.75, 2, 0.65, 0.5)),
        pytest.approx((0.75, 1.0, 2, 0.95, 1.0)),
    ]
    assert statistics.expected_calibration_error(bins) == pytest.approx((2 * 0.15 + 2 * 0.05) / 4)
    assert math.isnan(statistics.expected_calibration_error([]))


def test_correlations_by_hand() -> None:
    # deviations (-1, 0, 1) and (-1, -1, 2): 3 / sqrt(2 * 6)
    assert statistics.pearson([1, 2, 3], [1, 1, 4]) == pytest.approx(3 / math.sqrt(12))
    assert statistics.average_ranks([30, 10, 20, 20]).tolist() == [4.0, 1.0, 2.5, 2.5]
    assert statistics.spearman([1, 2, 3, 4], [1, 8, 27, 1000]) == pytest.approx(1.0)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: deviations give (2.25 + 0 + 0 + 2.25) / sqrt(4.5 * 5)
    assert statistics.spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(statistics.pearson([1, 1, 1], [1, 2, 3]))
    assert math.isnan(statistics.spearman([1], [1]))


def test_distinct_n_by_hand() -> None:
    texts = ["a b a b", "a b"]
    assert statistics.distinct_n(texts, 1) == pytest.approx(2 / 6)
    assert statistics.distinct_n(texts, 2) == pytest.approx(2 / 4)  # ab ba ab ab; no n-gram crosses two texts
    assert math.isnan(statistics.distinct_n(["a", ""], 2))


def test_line_13_ceiling_by_hand() -> None:
    assert statistics.accuracy_ceiling(0.82) == pytest.approx((0.82, 0.9))  # 0.9^2 + 0.1^2 = 0.82
    assert statistics.accuracy_ceiling(1.0) == (1.0, 1.0)
    assert statistics.accuracy_ceiling(0.4) == (0.4, 0.5)  # raters who agree less than by chance
    assert all(math.isnan(end) for end in statistics.accuracy_ceiling(math.nan))


def test_line_40_self_bleu_by_hand() -> None:
    # "a b c d" twice: each has the other as a reference. "a b x": of 3 words 2 match, of 2 pairs 1, of 1 triple none (0.1), and
    # the nearest reference has 4 words: exp(1 - 4/3).
    third = (2 / 3 * 1 / 2 * 0.1 / 1) ** (1 / 3) * math.exp(1 - 4 / 3)
    assert statistics.self_bleu(["a b c d", "a b c d", "a b x"]) == pytest.approx((1 + 1 + third) / 3)
    # "a a" against "a" and "b b b": one of two words (clipped), none of one pair; of the lengths 1 and 3 the shorter counts.
    # "a": one of one word, shorter than the nearest reference by one. "b b b" has no word of the others.
    assert statistics.self_bleu(["a a", "a", "b b b"]) == pytest.approx((math.sqrt(0.5 * 0.1) + math.exp(1 - 2) + 0) / 3)


def test_line_40_self_bleu_of_what_is_always_and_never_repeated() -> None:
    assert statistics.self_bleu(["yes .", "yes .", "no , thank you .", "no , thank you ."]) == pytest.approx(1.0)
    assert statistics.self_bleu(["a b c d e", "f g h i j", "k l m"]) == 0.0
    assert math.isnan(statistics.self_bleu(["a b c d", "", "  "])), "nothing to compare with"
    assert statistics.self_bleu(["a b c d", "", "a b c d"]) == pytest.approx(1.0)


def slow_bleu(hypothesis: list[str], references: list[list[str]]) -> float:
    """Papineni's definition, word by word, with Chen and Cherry's first smoothing."""
    if not set(hypothesis) & set(itertools.chain(*references)):
        return 0.0
    orders = range(1, min(4, len(hypothesis)) + 1)
    product = 1.0
    for n in orders:
        grams = [hypothesis[i : i + n] for i in range(len(hypothesis) - n + 1)]
        seen: list[list[list[str]]] = [[r[i : i + n] for i in range(len(r) - n + 1)] for r in references]
        distinct = [gram for i, gram in enumerate(grams) if gram not in grams[:i]]
        matches = sum(min(grams.count(gram), max(each.count(gram) for each in seen)) for gram in distinct)
        product *= (matches or 0.1) / len(grams)
    nearest = sorted((len(r) for r in references), key=lambda length: (abs(length - len(hypothesis)), length))[0]
    penalty = 1.0 if len(hypothesis) > nearest else math.exp(1 - nearest / len(hypothesis))
    return float(product ** (1 / len(orders)) * penalty)


def test_line_40_self_bleu_is_the_mean_of_the_slow_definition() -> None:
    generator = np.random.default_rng(3)
    for words in (3, 30):
        texts = [
            list(generator.choice(list("abcdefghijklmnopqrstuvwxyzABCD")[:words], generator.integers(1, 9))) for _ in range(14)
        ]
        expected = [slow_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
        assert statistics.self_bleu([" ".join(text) for text in texts]) == pytest.approx(np.mean(expected))


def test_line_40_perplexity_by_hand() -> None:
    # 2 + 4 nats over 1 + 2 tokens: e^2. A mean of the texts' own perplexities would say the same; 2 + 7 nats over 1 + 2: e^3.
    assert statistics.perplexity([2.0, 4.0], [1, 2], seed=0).value == pytest.approx(math.exp(2))
    assert statistics.perplexity([2.0, 7.0], [1, 2], seed=0).value == pytest.approx(math.exp(3))
    certain = statistics.perplexity([0.0, 0.0], [3, 2], seed=0)
    assert certain == (1.0, 1.0, 1.0)
    # every one of V words equally likely: V
    uniform = statistics.perplexity(np.array([5, 1, 7]) * math.log(50), [5, 1, 7], seed=0)
    assert uniform == pytest.approx((50, 50, 50))
    assert math.isinf(statistics.perplexity([1e6], [1], seed=0).value)
    assert math.isnan(statistics.perplexity([], [], seed=0).value)


def test_line_40_perplexity_ratio_by_hand_and_paired_by_prompt() -> None:
    nats, tokens = [3.0, 6.0, 1.0], [1, 2, 1]
    twice = statistics.perplexity_ratio(nats, tokens, [n - t * math.log(2) for n, t in zip(nats, tokens, strict=True)], tokens, 0)
    assert twice == pytest.approx((2, 2, 2)), "the same texts, each token half as likely: nothing varies but the prompts"
    # e^(10/4) / e^(5/5): the other texts have other lengths
    assert statistics.perplexity_ratio(nats, tokens, [1.0, 2.0, 2.0], [2, 2, 1], 0).value == pytest.approx(math.exp(2.5 - 1))
    for broken in ([], [math.nan, 1.0, 1.0], [math.inf, 1.0, 1.0]):
        assert math.isnan(statistics.perplexity_ratio(broken, tokens[: len(broken)], broken, tokens[: len(broken)], 0).value)


def test_line_40_perplexity_ratio_has_the_exact_bootstrap_interval() -> None:
    a, n, b, m = [3.0, 6.0, 1.0, 2.0], [1, 2, 1, 3], [1.0, 2.0, 2.0, 2.0], [2, 2, 1, 1]
    draws = [list(rows) for rows in itertools.product(range(4), repeat=4)]

    def share(x: list[float], y: list[int], rows: list[int]) -> float:
        return sum(x[i] for i in rows) / sum(y[i] for i in rows)

    exact = np.quantile([math.exp(share(a, n, rows) - share(b, m, rows)) for rows in draws], [0.025, 0.975])
    estimate = statistics.perplexity_ratio(a, n, b, m, seed=1, resamples=20_000)
    assert estimate[1:] == pytest.approx(tuple(exact), rel=0.1)


def test_line_40_difference_of_paired_shares_is_the_published_one() -> None:
    # Airways of 21 children after and before a transplantation, hyper-responsive both times, before, after or never: 1, 1, 7, 12.
    before, after = [1, 1] + [0] * 19, [1, 0] + [1] * 7 + [0] * 12
    assert statistics.paired_difference(before, after) == pytest.approx((-6 / 21, -0.507, -0.026), abs=5e-4)
    assert statistics.paired_difference(after, before) == pytest.approx((6 / 21, 0.026, 0.507), abs=5e-4)
    assert all(math.isnan(value) for value in statistics.paired_difference([], []))


def test_line_40_few_trials_that_do_not_differ_are_not_certainty() -> None:
    # All refuse: Wilson's interval of 10 of 10 is [10 / (10 + z^2), 1], and no correlation is known.
    width = 1 - 10 / (10 + 1.959964**2)
    assert statistics.paired_difference([1] * 10, [1] * 10) == pytest.approx((0.0, -width, width), abs=1e-5)
    # Half of 100, the same ones: phi = (50 * 50 - 50) / 2500 = 0.98. Wilson's ends are 0.5 -+ d: d * sqrt(1 - 2 * 0.98 + 1).
    d = 0.5 - statistics.wilson_interval(50, 100).low
    halves = [1] * 50 + [0] * 50
    assert statistics.paired_difference(halves, halves) == pytest.approx((0.0, -d * 0.2, d * 0.2), abs=1e-6)


def test_line_40_difference_of_paired_shares_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(1000):
        shared = generator.random(80)
        ours, theirs = shared < 0.7, np.where(generator.random(80) < 0.5, shared, generator.random(80)) < 0.6
        estimate = statistics.paired_difference(ours, theirs)
        covered += estimate.low <= 0.1 <= estimate.high
    assert 0.93 <= covered / 1000 <= 0.99
