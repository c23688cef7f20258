"""Keys and tokens in a text: those whose issuer gave them a form of their own, and values that are assigned to a name of a key.

The table is our own. The kept scanners were tried and left (November 2026): detect-secrets 1.5 (of May 2024) knows neither
Anthropic's nor Hugging Face's nor GitHub's fine-grained tokens and gives values without their places; its fork bc-detect-secrets
knows fewer; kingfisher-secret-scanner 1.5 compiles its rules for 7 s in each process, and then takes 19 µs for a clean kilobyte.

A password is not found: it has no form, and prose is full of the word.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

SHORTEST = 20  # characters without a break in any key found here; what `find` looks for before it comes here

# Each is written as its issuer documents it. `sk-` is the prefix of OpenAI, Anthropic, OpenRouter, DeepSeek and others.
_ISSUED = (
    r"(?:AKIA|ASIA)[A-Z2-7]{16}",  # AWS access key ids
    r"gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
    r"gl(?:pat|dt|ft|rt|cbt|ptt|imt|soat|agent)-[\w-]{20,300}",  # GitLab
    r"hf_[A-Za-z]{34}|api_org_[A-Za-z]{34}",  # Hugging Face
    r"AIza[\w-]{35}",  # Google
    r"GOCSPX-[\w-]{28}",  # Google OAuth
    r"xox[abeoprs]-[\w-]{20,300}|xapp-\d-[\w-]{20,300}",  # Slack
    r"[rs]k_live_[A-Za-z0-9]{20,250}",  # Stripe; `sk_test_` opens nothing
    r"SG\.[\w-]{22}\.[\w-]{43}",  # SendGrid
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-AgE[\w-]{50,300}",
    r"\d{8,10}:AA[\w-]{33}",  # Telegram bots
    r"SK[0-9a-f]{32}",  # Twilio
    r"dop_v1_[0-9a-f]{64}",  # DigitalOcean
    r"dapi[0-9a-f]{32}",  # Databricks
    r"gsk_[A-Za-z0-9]{40,100}",  # Groq
    r"r8_[A-Za-z0-9]{37}",  # Replicate
    r"xai-[A-Za-z0-9]{60,120}",  # xAI
    r"pplx-[A-Za-z0-9]{40,100}",  # Perplexity
    r"eyJ[\w-]{10,4000}+\.eyJ[\w-]{10,8000}+\.[\w-]{20,4000}",  # JSON Web Token, RFC 7519: two objects and a signature
)
_TOKEN = re.compile(r"(?<![\w-])(?:" + "|".join(_ISSUED) + r")(?![\w-])", re.ASCII)
_PREFIXES = (
    *("AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "hf_", "api_org_", "AIza", "GOCSPX-", "xox", "xapp-"),
    *("_live_", "SG.", "npm_", "pypi-", ":AA", "SK", "dop_v1_", "dapi", "gsk_", "r8_", "xai-", "pplx-", "eyJ"),
    *("glpat-", "gldt-", "glft-", "glrt-", "glcbt-", "glptt-", "glimt-", "glsoat-", "glagent-"),
)  # one of them is in each of these; looked for first, since that is ten times as fast
_SECRET_KEY = re.compile(r"(?<![\w-])sk-[\w-]{20,300}(?![\w-])", re.ASCII)
_PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----", re.ASCII)  # RFC 7468
_END = re.compile(r"-----END (?:[A-Z0-9]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----", re.ASCII)
_BODY = re.compile(r"[A-Za-z0-9+/=]{20}")
_BODY_LINES = re.compile(r"(?:(?:\s|\\[rn])*+[A-Za-z0-9+/=]{20,}+)*", re.ASCII)
_ASSIGNED = re.compile(
    r"(?:api[_ -]?key|access[_ -]?key(?:[_ -]?id)?|secret[_ -]?key|auth[_ -]?key|private[_ -]?key|secret|token|password|passwd)"
    r"[\"'`\])]{0,2}\s{0,3}(?::=|=>|[:=]|\bis\b)\s{0,3}(?:bearer\s{1,3})?[\"'`]?"
    r"(?P<value>[A-Za-z0-9_+/-]{20,200}+={0,2}+)(?![\w(\[+/-]|\.\w)",
    re.IGNORECASE | re.ASCII,
)
_BEARER = re.compile(r"\bbearer\s{1,3}(?P<value>[A-Za-z0-9_+/-]{20,200}+={0,2}+)(?![\w(\[+/-]|\.\w)", re.IGNORECASE | re.ASCII)
_NAMES = ("key", "secret", "token", "passw", "bearer")  # one of them, in small letters, is in what the last two match
_STEP = re.compile(r"(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])")
# Of 20,000 random texts of 32 hexadecimal digits 2 have less entropy; of base64 of 24, 32 and 40 characters 10, 3 and 1 % have
# fewer steps. Names of models, files and settings have two steps at most, since their digits stand together.
ENTROPY_BITS = 3.0  # a character
STEPS = 3  # from letter to digit or back


def keys(text: str) -> Iterator[tuple[int, int]]:
    """Where keys are, as (start, end). Two may overlap."""
    if "PRIVATE KEY" in text:
        for found in _PRIVATE_KEY.finditer(text):
            yield from _private_key(text, *found.span())
    if any(prefix in text for prefix in _PREFIXES):
        for found in _TOKEN.finditer(text):
            yield found.span()
    if "sk-" in text:
        for found in _SECRET_KEY.finditer(text):
            if random_looking(found[0][3:]):
                yield found.span()
    small = text.lower()
    if any(name in small for name in _NAMES):
        for pattern in (_ASSIGNED, _BEARER):
            for found in pattern.finditer(text):
                if random_looking(found["value"]):
                    yield found.span("value")


def _private_key(text: str, start: int, body: int) -> Iterator[tuple[int, int]]:
    """From the BEGIN line, whose end is at `body`, to the END line; to the last line of base64 if the key is cut off."""
    dashes = text.find("-----", body)
    end = _END.match(text, dashes) if dashes >= 0 else None
    if end and _BODY.search(text, body, dashes):
        yield start, end.end()
    elif lines := _BODY_LINES.match(text, body):
        if lines.end() > body:
            yield start, lines.end()


def random_looking(value: str) -> bool:
    """Whether a text is nobody's word or name: letters and digits in turn, and no character much more often than another."""
    counts = Counter(value)
    entropy = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    return entropy >= ENTROPY_BITS and sum(1 for _ in _STEP.finditer(value)) >= STEPS
