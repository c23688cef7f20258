"""What is found in texts, what is not, and masking.

The numbers are those that issuers document for tests or that are set aside for fiction; keys are made up.
"""

import hashlib
import random
import string
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from components.ingest_rankings.personal_data.find import _IBAN_LENGTHS, find, is_card, is_iban, may_hold, may_hold_each, plain
from components.ingest_rankings.personal_data.keys import random_looking
from components.ingest_rankings.personal_data.mask import masked, masked_value
from components.ingest_rankings.stage import Config

RANDOM = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0hL"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
PEM = "-----BEGIN RSA PRIVATE KEY-----\n" + "\n".join([RANDOM * 2] * 4) + "\n-----END RSA PRIVATE KEY-----"
FOUND = {
    "email": [
        "jane.doe@example.org",
        "a+b_c%d'e@mail.example.co.uk",
        "o'neil-2@example.com",
        "müller@bücher.example",
        "用户@例子.广告",
        "1@163.com",
        "jane＠example.org",
    ],
    "phone": [
        "+1 202 555 0143",
        "+1-202-555-0143",
        "+1 (202) 555-0143",
        "+12025550143",
        "+44 20 7946 0958",
        "+49 (0)30 901820",
        "+33 1 23 45 67 89",
        "+91 98765 43210",
        "+1\u00a0202\u00a0555\u20110143",
        "＋１ ２０２ ５５５ ０１４３",
        "+٩٧١ ٥٠ ١٢٣ ٤٥٦٧",
    ],
    "card": [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111111111111111",
        "5555555555554444",
        "2223003122003222",
        "3782 822463 10005",
        "371449635398431",
        "6011111111111117",
        "3056 930902 5904",
        "3566002020360505",
        "6200000000000005",
    ],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "FR14 2004 1010 0505 0001 3M02 606", "NO93 8601 1117 947"],
    "key": [
        "AKIAQYLPMN5HHHFPZAM2",
        "ghp_" + "a1B2c3D4e5F6" * 3,
        "github_pat_" + "1" * 22 + "_" + "a1B2c3D4e5F6" * 4 + "a1B2c3D4e5F",
        "glpat-" + RANDOM[:20],
        "sk-" + RANDOM,
        "sk-proj-" + RANDOM * 3,
        "sk-ant-api03-" + RANDOM * 3,
        "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZabcdefgh",
        "AIza" + RANDOM + "abc",
        "xoxb-123456789012-" + RANDOM,
        "sk_live_" + RANDOM,
        JWT,
        PEM,
        PEM.replace("\n", "\\n"),
        PEM.replace("RSA ", "").replace(" PRIVATE KEY", " PGP PRIVATE KEY BLOCK"),
    ],
}
NOTHING = [
    "",
    "Order 1234567890123456 of 2024-01-31T10:00:00+01:00, parcel 00340434161094042557",
    "4111 1111 1111 1112",  # check digit
    "9999 9999 9999 9995",  # no issuer
    "41111111111111111",  # 17 digits
    "0.4111111111111111 and 4111111111111111.5 and 1e+1202555014",
    "https://example.com/status/4111111111111111",
    "id-4111111111111111 x4111111111111111 4111111111111111x",
    "123e4567-e89b-12d3-a456-426614174000",
    "da39a3ee5e6b4b0d3255bfef95601890afd80709 d41d8cd98f00b204e9800998ecf8427e",
    hashlib.sha256(b"").hexdigest(),
    "192.168.100.200 10.0.0.1:8080 2001:db8::8a2e:370:7334",
    "version 1.2.3-beta.4+build.20240131, python-3.11.7",
    "ISBN 978-3-16-148410-0, 3.14159265358979, 1,234,567,890 km, $1 000 000 000 000",
    "x = y+12025550143 + 4915112345678; z=(a)+12025550143",
    "GMT+0100, +5, +1, C++17, 1+1=2, 555-1234",
    "@property def f(self): return A@B.mean() + X@np.linalg.inv(Y)",
    "git@github.com:rankloop/rankloop.git react@18.2.0 lodash@4.17.21-rc.next @types/node@20.1.0",
    "https://github.com/a/b/issues/31884\n@pytest.mark.slow",
    "int32 is (2147483647, 2147483620), (-2147483648) or (2025550143); 2.0255501430; pp. 202-555. 0143",
    "user@localhost, @jane, a@b, https://medium.com/@jane/post, https://jane@example.org/repo",
    "postgres://user:password@example.org/db https://u:${TOKEN1}@example.org",
    "DE88 3704 0044 0532 0130 00",  # check digits
    "DE89 3704 0044 0532 0130 001",
    "ZZ89 3704 0044 0532 0130 00",  # no country
    "AB12 the model GB29 is not an account",
    "api_key = os.environ['OPENAI_API_KEY']; token = tokenizer.decode_the_first_token2(x)",
    "secret: production-database-2-of-the-team, token=my-model-v2-2024-01-checkpoint",
    "api_key=YOUR_API_KEY_GOES_HERE, password = correct-horse-battery-staple",
    "sk-folding-cube-of-a-spinner-2 hf_hub_download_of_a_file_with_a_name ghp_short",
    "-----BEGIN RSA PRIVATE KEY----- is how such a file begins -----END RSA PRIVATE KEY-----",
    "-----BEGIN PUBLIC KEY-----\n" + RANDOM * 2 + "\n-----END PUBLIC KEY-----",
    "a-very-long-compound-word-of-many-parts ________________________ ------------------------",
    "“naïve” — 2020–2024, 10 000 000 000 000 €",
]


def values(text: str, region: str = "") -> list[tuple[str, str]]:
    return [(hit.kind, text[hit.start : hit.end]) for hit in find(text, region)]


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, each in FOUND.items() for value in each])
def test_found_alone_and_in_a_sentence(kind: str, value: str) -> None:
    for frame in ("%s", "Take %s.", "(%s)", "first\n%s\nlast", "Take “%s”, it is one", "In 2024 %s, ok?"):
        assert values(frame % value) == [(kind, value)], frame


@pytest.mark.parametrize("text", NOTHING)
def test_not_found(text: str) -> None:
    assert values(text) == []
    assert values(text, "US") == []
    assert masked([text])[0] is text


ASSIGNED = (
    "api_key = '%s'",
    "API-KEY: %s.",
    '{"access_token": "%s"}',
    "the secret is `%s`",
    "Authorization: Bearer %s",
    "TOKEN=%s",
)


def test_assigned_keys() -> None:
    for text in ASSIGNED:
        for value in (RANDOM, "0123456789abcdef" * 2, "wJalrXUtnFEMI/K7MDENG/bPxRfiCY3dK1uL9wQz"):
            assert values(text % value) == [("key", value)], text
    assert values(f"the commit is {RANDOM}") == []
    assert values("clone https://bob:hunter2x@example.org/x") == [("key", "hunter2x")]


def test_a_private_key_that_is_cut_off_ends_with_its_base64() -> None:
    cut = PEM[:150]
    assert values(f"{cut}\n\nis all that I have of it") == [("key", cut)]


def test_two_side_by_side_are_two() -> None:
    found = "jane@example.org,bob@example.org;+1 202 555 0143/+1 202 555 0144 5555555555554444,4111111111111111"
    assert [kind for kind, _ in values(found)] == ["email", "email", "phone", "phone", "card", "card"]


@pytest.mark.parametrize(
    ("region", "number"),
    [
        *(("US", number) for number in ("(202) 555-0143", "202-555-0143", "202.555.0143", "1-202-555-0143")),
        *(("DE", number) for number in ("030/901820", "(030) 901820", "0171 1234567", "01711234567")),
        *(("GB", number) for number in ("020 7946 0958", "(020) 7946 0958")),
        *(("FR", number) for number in ("01 23 45 67 89", "06.12.34.56.78")),
    ],
)
def test_national_numbers_only_with_their_region(region: str, number: str) -> None:
    assert values(f"Call {number}, please.", region) == [("phone", number)]
    assert values(f"Call {number}, please.") == []
    assert values("Call +44 20 7946 0958", region) == [("phone", "+44 20 7946 0958")]


def test_a_national_number_without_groups_is_an_order() -> None:
    assert values("Order 2025550143", "US") == []
    assert values("2024 2024 3.5 and 2024 3.5 2024", "US") == []


def test_unknown_region_is_refused() -> None:
    with pytest.raises(ValidationError, match="no numbering plan of 'us'"):
        Config(phone_region="us")


@given(st.integers(0, 9), st.integers(0, 14), st.integers(1, 9))
def test_a_wrong_digit_is_no_card(last: int, place: int, more: int) -> None:
    number = "411111111111111" + str(last)
    assert is_card(number) == (last == 1)
    wrong = [*map(int, "4111111111111111")]
    wrong[place] = (wrong[place] + more) % 10
    assert not is_card("".join(map(str, wrong)))


def test_random_integers_are_seldom_cards() -> None:
    draw = random.Random(1)
    hits = sum(is_card("".join(draw.choices(string.digits, k=16))) for _ in range(20_000))
    assert 0.01 < hits / 20_000 < 0.025


@given(st.sampled_from(sorted(_IBAN_LENGTHS)), st.data())
def test_iban_check_digits(country: str, data: st.DataObject) -> None:
    account = data.draw(st.text(string.digits + string.ascii_uppercase, min_size=0, max_size=30))
    account = (account + "0" * 30)[: _IBAN_LENGTHS[country] - 4]
    remainder = int("".join(str(int(sign, 36)) for sign in account + country + "00")) % 97
    right = f"{country}{98 - remainder:02d}{account}"
    assert is_iban(right)
    wrong = f"{country}{(98 - remainder + data.draw(st.integers(1, 95))) % 97:02d}{account}"
    assert not is_iban(wrong)
    assert not is_iban(right + "0")


def test_random_values_look_random() -> None:
    draw = random.Random(2)
    for letters, length, least in ((string.hexdigits[:16], 32, 0.99), (string.ascii_letters + string.digits, 32, 0.95)):
        texts = ["".join(draw.choices(letters, k=length)) for _ in range(2000)]
        assert sum(map(random_looking, texts)) / 2000 > least


# -- masking ---------------------------------------------------------------------------------------------------------------

PIECE = st.sampled_from([value for each in FOUND.values() for value in each] + NOTHING) | st.text(max_size=8)
GLUE = st.sampled_from(["", " ", "\n", ", ", "+", "@", "-", ".", ":", "://u:", "x", "1", "api_key=", "["])
TEXT = st.lists(st.tuples(PIECE, GLUE), min_size=1, max_size=4).map(lambda parts: "".join(piece + glue for piece, glue in parts))


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=3), st.sampled_from(["", "US", "DE"]))
def test_masking_leaves_nothing_and_is_idempotent(texts: list[str], region: str) -> None:
    result = masked(texts, region)
    for old, new in zip(texts, result, strict=True):
        assert find(new, region) == []
        for hit in find(old, region):
            assert all(old[hit.start : hit.end] not in each for each in result)
        assert new is old or new != old
    assert all(again is once for again, once in zip(masked(result, region), result, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["N"], exclude_characters="@+_/"), max_size=19))
def test_a_text_without_candidates_is_the_same_object(text: str) -> None:
    assert masked([text])[0] is text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_places_do_not_overlap(text: str) -> None:
    last = 0
    for hit in find(text, "US"):
        assert last <= hit.start < hit.end <= len(text)
        last = hit.end


def test_a_value_is_masked_where_it_stands_alone() -> None:
    question, answer = f"api_key = {RANDOM}, mail jane@example.org", f"Your key is {RANDOM}; it is Jane's."
    assert masked([question, answer]) == ["api_key = [KEY], mail [EMAIL]", "Your key is [KEY]; it is Jane's."]


def test_json_values_keep_their_shape() -> None:
    value = {"jane@example.org": ["+1 202 555 0143", 1, None, {"a": "b"}], "n": 2.5}
    assert masked_value(value, "") == {"[EMAIL]": ["[PHONE]", 1, None, {"a": "b"}], "n": 2.5}
    clean = {"a": ["b", 1]}
    assert masked_value(clean, "") is clean


TRICKY = (
    "a",
    "@",
    "a@",
    "a@b.",
    "eyJ",
    "-eyJ-",
    "-----BEGIN PRIVATE KEY-----",
    "7",
    "1-",
    "+1 202 555 ",
    "(1",
    "4111 ",
    "token=",
    "://u:1",
)


@pytest.mark.parametrize("piece", TRICKY)
def test_time_grows_with_the_text_not_with_its_square(piece: str) -> None:
    """Texts that make a careless pattern look at every pair of places."""

    def seconds(size: int) -> float:
        start = time.process_time()
        find(piece * (size // len(piece)), "US")
        return time.process_time() - start

    assert seconds(40_000) < 0.3 + 10 * seconds(5_000)  # eight times the text; its square is 64 times as much


def test_no_text_that_holds_something_is_passed_over() -> None:
    texts = [text for each in FOUND.values() for text in each]
    assert all(may_hold_each(texts, ""))
    assert may_hold_each(["Nothing in here, 2 or 3 words, 1-2-3 and 555 01 43.", ""], "") == [False, False]


@example(texts=["0+1", "+1", "++1", "\n+(1", ")+1", "_+1"], region="")
@given(
    texts=st.lists(st.text(st.sampled_from("0123456789 -.()/+@aZ_\n\u0664\uff20"), max_size=40) | st.text(max_size=20)),
    region=st.sampled_from(["", "US"]),
)
def test_the_look_at_many_texts_is_the_look_at_each(texts: list[str], region: str) -> None:
    for text, may in zip(texts, may_hold_each(texts, region), strict=True):
        assert may == (may_hold(plain(text), region) or not text.isascii())
