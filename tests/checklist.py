"""What a correct reward model, PPO and evaluation must do, line by line, and which test holds each line.

A test belongs to line 7 if it is called `test_line_07_...`, and to a mistake if it is called `test_mistake_WORD_...`; so no test
stands for two. `python -m tests.checklist` writes the table `tests/CHECKLIST.md`; `tests/unit/test_checklist.py` fails where a line
has no test, a name belongs to no line, or the table is old.

Where the lines come from: Ouyang 2022 (2203.02155), Stiennon 2020 (2009.01325), Bai 2022 (2204.05862), Huang 2024 (2403.17031), Gao
2022 (2210.10760), Coste 2023 (2310.02743), Singhal 2023 (2310.03716), Zheng 2023 (2307.04964), and the libraries that got it wrong.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
TABLE = FOLDER / "CHECKLIST.md"

LINES = {
    1: "The pad token is one of its own, never EOS; a model that comes without one gets one.",
    2: "Generation pads prompts on the left, scoring and training pad on the right, and positions follow the mask.",
    3: "Whatever a model is trained or scored on ends with EOS, in evaluation as in training.",
    4: "A long prompt loses its front, at a message or a line; a completion is never cut silently; both are counted and logged.",
    5: "Train and test, and reward model and judge, share no prompt.",
    6: "Before training, the log shows one example as tokens that a person can read.",
    7: "The reward model is the SFT model with a head of standard deviation 1/sqrt(d+1) and no bias.",
    8: "A score is the head's value at the last real token; batch and padding do not change it.",
    9: "K completions cost K forward passes, a shared prompt one; their pairs are one batch element, each with weight 1/C(K,2).",
    10: "Tied completions give no loss, or half of it both ways; their position decides nothing.",
    11: "One epoch unless told otherwise, no dropout; margin, label smoothing and centring can be switched on.",
    12: "After training, what raters preferred scores 0 in the mean; the constants are saved in the model.",
    13: "Reported: accuracy with intervals in every slice, calibration, length and what it alone would reach, the human ceiling's "
    "two ends; accuracy above it is called a leak.",
    14: "On request, accuracy on raters that the model never saw, by k-fold over raters.",
    15: "Ensembles: seeds of their own; mean, worst case, mean minus variance; how far the members err together is measured.",
    16: "Completions are drawn from the softmax at a temperature; any other way of sampling is refused.",
    17: "Policy, old policy and reference give log-probabilities at the temperature that was sampled at.",
    18: "Nothing behind the first EOS reaches a score, a loss or a statistic.",
    19: "Without EOS within its budget, a completion gets a fixed score in place of the reward model's.",
    20: "One seed, one run; the order of the data has a stream of random numbers apart from the sampling's.",
    21: "Reference, reward model and judge do not change, and nothing has dropout.",
    22: "The sampler's log-probabilities are compared with the trainer's; the difference is logged, bounded and corrected.",
    23: "A token's reward is -beta times its log-ratio to the reference, of either sign; the last real one has the score besides.",
    24: "Discount 1 and lambda 0.95; the value behind the end is 0.",
    25: "The value model learns returns of plain advantages; the policy learns advantages whitened to mean 0 over real tokens.",
    26: "Whitened rewards keep their mean; variances are the population's, over the whole batch of all processes.",
    27: "Ratios are clipped at 0.2, values at 0.2 around the old ones, and the value loss weighs 0.1.",
    28: "Losses are means over the batch's real tokens, however it is cut into micro-batches and shared by processes.",
    29: "AdamW with epsilon 1e-5, a warm-up, a rate that falls to 0, and a bound on the norm of the whole gradient.",
    30: "The value model starts as the reward model; the value model alone may learn first.",
    31: "Beta follows a KL target by at most 0.2 n/horizon an update, or stays fixed.",
    32: "Plain text can be mixed into PPO's steps, against what it makes the policy forget.",
    33: "At the first update the ratio is 1 and the KL to the reference is 0.",
    34: "Every update logs rewards, KLs, entropy, clipping, explained variance, lengths, losses, norms, beta, speed and times, "
    "over real tokens alone.",
    35: "A judge that nobody optimises scores the same samples; if it falls while the reward rises, PPO stops and keeps the best.",
    36: "Numbers that are not finite, a KL that runs away and one answer to everything end the run for good, each by its name.",
    37: "A run that is killed anywhere ends with the same bits.",
    38: "Win rates over SFT and champion on held-out prompts, ties counted, with bootstrap intervals, raw and at equal length.",
    39: "Whoever judges was not optimised, and which answer comes first decides nothing.",
    40: "KL, diversity, length, refusals and perplexity have thresholds in the gate.",
    41: "All numbers of the gate are in the report and on the registered version.",
}

MISTAKES = {
    "whitening": "Whitened advantages that got their mean back.",
    "divergence": "A pair's loss at every token after the two texts part, the padding of the shorter one included.",
    "averaging": "KL, ratio and entropy divided by padded lengths, so that short answers make them small.",
    "clamping": "A token's KL cut off at 0.",
    "penalty": "A missing EOS that takes something off the score, where it should replace it.",
    "placement": "The score put behind EOS, not on it.",
    "logits": "All logits of a rollout in memory at once.",
    "restart": "A resumed training that begins at step 0.",
    "value": "A value model that is thrown away on resume.",
    "clipping": "No bound on the gradient.",
    "parsing": "Held-out data that cannot be read, dropped in silence, and no evaluation then.",
    "deployment": "A deployment that waits for no verdict.",
}

_LINE, _MISTAKE = re.compile(r"test_line_(\d\d)_\w+"), re.compile(r"test_mistake_([a-z]+)_\w+")


@cache
def named_tests() -> dict[int | str, list[str]]:
    """The tests of each line, by its number, and of each mistake, by its word, as `path::name`; under "" what names neither."""
    found: dict[int | str, list[str]] = defaultdict(list)
    for path in sorted(FOLDER.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith(("test_line_", "test_mistake_")):
                line, mistake = _LINE.fullmatch(node.name), _MISTAKE.fullmatch(node.name)
                topic: int | str = int(line[1]) if line else mistake[1] if mistake else ""
                known = topic if topic in LINES or topic in MISTAKES else ""
                found[known].append(f"{path.relative_to(FOLDER).as_posix()}::{node.name}")
    return dict(found)


def table() -> str:
    """The Markdown table."""
    found = named_tests()
    rows = [f"| {key} | {statement} | {_cell(found.get(key, []))} |" for key, statement in (LINES | MISTAKES).items()]
    lines, mistakes = rows[: len(LINES)], rows[len(LINES) :]
    return "\n".join(
        [
            "# Which test holds which line",
            "",
            "Written by `python -m tests.checklist` from the statements in `checklist.py` and the names of the tests.",
            "",
            "| line | what must hold | tests |",
            "|---|---|---|",
            *lines,
            "",
            "## Mistakes read in other libraries",
            "",
            "| mistake | what went wrong there | tests |",
            "|---|---|---|",
            *mistakes,
            "",
        ]
    )


def _cell(tests: list[str]) -> str:
    """Tests by file: `[file](path): name, name`."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        path, _, name = test.partition("::")
        by_file[path].append(f"`{name}`")
    return "<br>".join(f"[{path}]({path}): {', '.join(names)}" for path, names in by_file.items())


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
