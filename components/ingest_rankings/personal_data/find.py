"""Personal data in a text: e-mail addresses, phone numbers, card numbers, IBANs, keys and tokens, each with its place.

What has a check digit is checked by it; phone numbers are those that the numbering plan of their country allows, by Google's
libphonenumber. Names and postal addresses are not found: that takes a model of the language.

Most texts hold nothing. `may_hold` tells in some microseconds a kilobyte, and only the others are read by the patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from phonenumbers import SUPPORTED_REGIONS, Leniency, PhoneNumberMatcher

from components.ingest_rankings.personal_data.keys import SHORTEST, keys

KINDS = ("email", "phone", "card", "iban", "key")


class Hit(NamedTuple):
    """One of `KINDS` at text[start:end]."""

    start: int
    end: int
    kind: str


# -- the first look --------------------------------------------------------------------------------------------------------

_RUNS = bytes(ord("a") if chr(code) in "_+/-" or (code < 128 and chr(code).isalnum()) else ord(" ") for code in range(256))
_DIGITS = bytes(ord("0") if chr(code) in "0123456789" else code for code in range(256))
_RUN, _CARD, _PHONE = b"a" * SHORTEST, b"0" * 10, b"0" * 7  # ten digits in a row: in every card, and in IBANs but for freak ones

# Other digits and signs that stand for ASCII's, one for one, so that places stay the same: Arabic, Devanagari, full width, ...
_ZEROS = "\u0660\u06f0\u0966\u09e6\u0a66\u0ae6\u0be6\u0c66\u0ce6\u0d66\u0e50\u0ed0\u1040\u17e0\uff10"  # each begins its ten digits
_PLAIN = {chr(ord(zero) + digit): str(digit) for zero in _ZEROS for digit in range(10)}
_PLAIN |= dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000", " ") | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\uff0d", "-")
_PLAIN |= {"\uff20": "@", "\uff0b": "+", "\uff08": "(", "\uff09": ")", "\uff0e": "."}
_OTHER = re.compile("[" + "".join(map(re.escape, sorted(_PLAIN))) + "]")


def plain(text: str) -> str:
    """The text with ASCII's digits, spaces, hyphens, @ and + for those of other scripts, each in its place."""
    return text if text.isascii() else _OTHER.sub(lambda sign: _PLAIN[sign[0]], text)


class _Look(NamedTuple):
    """What a plain text has that something could be made of."""

    at: bool
    plus: bool
    run: bool
    digits: bool


def _look(text: str, region: str) -> _Look:
    data = text.encode("utf-8", "surrogatepass")
    digits = _PHONE in data.translate(_DIGITS, b" -.()/") if region else _CARD in data.translate(_DIGITS, b" -")
    plus = "+" in text and _INTERNATIONAL.search(text) is not None
    return _Look("@" in text, plus, _RUN in data.translate(_RUNS), digits)


def may_hold(text: str, region: str) -> bool:
    """False if there is nothing to be found in a plain text."""
    return any(_look(text, region))


# The same of ASCII texts, and of no other, by one automaton for all of it (RE2).
_ANY = rf"[^\x00-\x7f]|@|(?:^|[^\w)+])\+\(?[1-9]|[A-Za-z0-9_+/-]{{{SHORTEST}}}|[0-9](?:[ -]*[0-9]){{9}}"
_ANY_NATIONAL = _ANY + r"|[0-9](?:[ .()/-]*[0-9]){6}"


def may_hold_each(texts: Sequence[str], region: str) -> list[bool]:
    """Of each text, as it is, `may_hold`, and true of each with a sign beyond ASCII; a quarter of the time for many texts."""
    found: list[bool] = pc.match_substring_regex(pa.array(texts, pa.string()), _ANY_NATIONAL if region else _ANY).to_pylist()
    return found


# -- e-mail addresses ------------------------------------------------------------------------------------------------------

# Not `A@B.mean()`, `git@host.org:path/…` nor `react@18.2.0-rc.one`.
_DOMAIN = re.compile(r"@(?!\d+\.\d+\.)(?:[^\W_](?:[^\W_]|-){0,62}\.){1,8}[^\W\d_]{2,63}(?![\w@-])(?!(?:\.\w+)*\()(?!:[\w~.-]*/)")
_LOCAL_CHARACTERS = 64  # of what stands before the @
_LOCAL = re.compile(r"[\w%+](?:[\w.%+'-]*[\w%+-])?\Z")
# https://user:password@host; a word without a digit, or in brackets, stands for a password.
_IN_ADDRESS = re.compile(r"://[^\s:@/]{0,64}:(?P<value>(?![<{\[$*])(?=[^\s@/]*\d)[^\s:@/]{6,200})@[\w.-]", re.ASCII)
_USER = re.compile(r"://[^\s@/]{0,64}\Z")


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for domain in _DOMAIN.finditer(text):
        at = domain.start()
        local = _LOCAL.search(text, max(0, at - _LOCAL_CHARACTERS), at)
        if local and not _USER.search(text, max(0, local.start() - 80), local.start()):
            yield local.start(), domain.end()


# -- cards -----------------------------------------------------------------------------------------------------------------

# First and last prefix of an issuer and the lengths of its numbers, by ISO/IEC 7812 and the issuers' own pages.
_ISSUERS = (
    ("4", "4", {16}),  # Visa; its old 13 digits and the 19 that it has reserved are hit by chance more than in earnest
    ("51", "55", {16}),  # Mastercard
    ("2221", "2720", {16}),
    ("34", "34", {15}),  # American Express
    ("37", "37", {15}),
    ("6011", "6011", {16}),  # Discover
    ("644", "659", {16}),
    ("300", "305", {14}),  # Diners Club
    ("36", "36", {14}),
    ("38", "39", {14}),
    ("3528", "3589", {16}),  # JCB
    ("62", "62", {16, 17, 18, 19}),  # UnionPay
)
_CARD_NUMBER = re.compile(
    r"\d(?<![\w+/-]\d)(?<!\d\.\d)(?:\d{13,18}|\d{3}([ -])\d{4}\1\d{4}\1\d{4}|\d{3}([ -])\d{6}\2\d{4,5})(?!\w)(?!-\w)(?!\.\d)",
    re.ASCII,
)


def is_card(digits: str) -> bool:
    """Whether an issuer has numbers like this one and its last digit is right (Luhn, ISO/IEC 7812-1 annex B)."""
    if not any(first <= digits[: len(first)] <= last and len(digits) in lengths for first, last, lengths in _ISSUERS):
        return False
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _cards(text: str) -> Iterator[tuple[int, int]]:
    place = 0
    while found := _CARD_NUMBER.search(text, place):
        right = is_card(found[0].replace(" ", "").replace("-", ""))
        place = found.end() if right else found.start() + 1  # in "2024 4111 1111 1111 1111" the card begins with the second group
        if right:
            yield found.span()


# -- bank accounts ---------------------------------------------------------------------------------------------------------

# Lengths by country: the IBAN registry of SWIFT (ISO 13616).
_IBAN_LENGTHS = {
    each[:2]: int(each[2:])
    for each in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 ES24 FI18 "
        "FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 "
        "LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 "
        "SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
    ).split()
}
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d{2}(?= ?[A-Z0-9]{4})", re.ASCII)
_IBAN_REST = {n: re.compile(rf"[A-Z]{{2}}\d{{2}}(?: ?[A-Z0-9]){{{n - 4}}}(?![A-Za-z0-9])") for n in set(_IBAN_LENGTHS.values())}


def is_iban(number: str) -> bool:
    """Whether the country has accounts of this length and the two check digits are right (ISO 7064, mod 97-10)."""
    if len(number) != _IBAN_LENGTHS.get(number[:2]):
        return False
    return int("".join(str(int(sign, 36)) for sign in number[4:] + number[:4])) % 97 == 1


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for start in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(start[0][:2])
        found = _IBAN_REST[length].match(text, start.start()) if length else None
        if found and is_iban(found[0].replace(" ", "")):
            yield found.span()


# -- phone numbers ---------------------------------------------------------------------------------------------------------

_INTERNATIONAL = re.compile(r"\+(?<![\w)+]\+)\(?[1-9]", re.ASCII)
_NATIONAL = re.compile(r"[(\d](?<![\w.+/-].)(?<!\d .)(?:(?<=\d)|(?=\d))[\d ()./-]{6,21}(?<=\d)(?!\w)", re.ASCII)
_NO_GROUPS = re.compile(r"\(?\d+(?:\.\d+)?\)?|.*\. .*")  # an integer, a decimal number, or two sentences
_NUMBER_CHARACTERS = 48  # the longest number with its separators and an extension


def check_region(region: str) -> None:
    """A region is the two letters of a country, or empty.

    Raises:
        ValueError: the country has no numbering plan.
    """
    if region and region not in SUPPORTED_REGIONS:
        raise ValueError(f"no numbering plan of {region!r}; give a country as two capital letters (ISO 3166), such as DE or US")


def _international(text: str, taken: bytearray) -> Iterator[tuple[int, int]]:
    for start in _INTERNATIONAL.finditer(text):
        yield from _phone_at(text, start.start(), None, Leniency.VALID, taken)


def _national(text: str, region: str, taken: bytearray) -> Iterator[tuple[int, int]]:
    """Those in the groups in which the region writes them, or with the 0 of the trunk line: digits alone may be an order's number,
    and in any groups a row of a table."""
    for found in _NATIONAL.finditer(text):
        if not taken[found.start()]:
            for start, end in _phone_at(text, found.start(), region, Leniency.STRICT_GROUPING, taken):
                if text[start] == "0" or not _NO_GROUPS.fullmatch(text, start, end):
                    yield start, end


def _phone_at(text: str, start: int, region: str | None, leniency: int, taken: bytearray) -> Iterator[tuple[int, int]]:
    stop = taken.find(1, start, start + _NUMBER_CHARACTERS)  # a card behind it is not its extension
    part = text[start : stop if stop >= 0 else start + _NUMBER_CHARACTERS]
    for match in PhoneNumberMatcher(part, region, leniency=leniency):
        if match.start == 0:
            yield start, start + match.end
        return


# -- all of them -----------------------------------------------------------------------------------------------------------


def find(text: str, region: str = "") -> list[Hit]:
    """The personal data in a text in its order; no two overlap.

    Args:
        region: two letters (ISO 3166) of the country whose phone numbers are found without + and its code; "" for none.
    """
    text = plain(text)
    look = _look(text, region)
    if not any(look):
        return []
    hits: list[Hit] = []
    taken = bytearray(len(text))  # what overlaps with an earlier hit is part of it
    for kind, spans in _finders(text, look, region, taken):
        for start, end in spans:
            if 1 not in taken[start:end]:
                taken[start:end] = b"\x01" * (end - start)
                hits.append(Hit(start, end, kind))
    return sorted(hits)


def _finders(text: str, look: _Look, region: str, taken: bytearray) -> Iterator[tuple[str, Iterable[tuple[int, int]]]]:
    """The surest first."""
    if look.run:
        yield "key", keys(text)
    if look.at:
        yield "key", (found.span("value") for found in _IN_ADDRESS.finditer(text))
        yield "email", _emails(text)
    if look.digits:
        yield "iban", _ibans(text)
        yield "card", _cards(text)
    if look.plus:
        yield "phone", _international(text, taken)
    if look.digits and region:
        yield "phone", _national(text, region, taken)
