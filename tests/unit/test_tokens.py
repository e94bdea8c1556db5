"""Tokens and the keys that they are checked with."""

import asyncio
import hmac
import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.utils import base64url_encode

from adapters.identity import ALGORITHMS, MAX_TOKEN, BadToken, KeysUnavailable
from adapters.identity.keys import KEPT, LIFETIME, PAUSE, Keys, KeysFault, from_file, parse
from adapters.identity.tokens import LEEWAY, Tokens
from certificates import AUDIENCE, ISSUER, Issuer
from entrypoints.grpc_api.access import Access
from entrypoints.policy import Policy

ES256 = frozenset({"ES256"})


class Source:
    """A key set that somebody else keeps, and a clock."""

    def __init__(self, content: str) -> None:
        self.content = content
        self.broken = False
        self.asked = 0
        self.now = 0.0
        self.open = asyncio.Event()
        self.open.set()

    async def load(self) -> bytes:
        self.asked += 1
        await self.open.wait()
        if self.broken:
            raise KeysFault("can't be fetched")
        return self.content.encode()


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def source(issuer: Issuer) -> Source:
    return Source(issuer.jwks)


@pytest.fixture
def tokens(source: Source) -> Tokens:
    keys = Keys(source.load, ES256, lambda: source.now)
    return Tokens(keys, ISSUER, AUDIENCE, ES256)


async def why(tokens: Tokens, text: str) -> str:
    """Why a token is not believed."""
    with pytest.raises(BadToken) as bad:
        await tokens.read(text)
    assert text[:12] not in str(bad.value)
    return bad.value.why


async def test_a_good_token_says_for_whom_it_is(tokens: Tokens, issuer: Issuer) -> None:
    assert (await tokens.read(issuer.token("ada"))).subject == "ada"
    assert (await tokens.read(issuer.token("ada"))).client == ""
    assert (await tokens.read(issuer.token("ada", azp="app"))).client == "app"
    assert (await tokens.read(issuer.token("ada", client_id="app2"))).client == "app2"
    several = await tokens.read(issuer.token("eve", aud=["other", AUDIENCE], nbf=0))
    assert several.subject == "eve"


@pytest.mark.parametrize(
    ("claims", "word"),
    [
        ({"seconds": -LEEWAY - 1}, "ExpiredSignature"),
        ({"exp": "soon"}, "Decode"),
        ({"exp": 1e400}, "Decode"),
        ({"nbf": 9_999_999_999}, "ImmatureSignature"),
        ({"aud": "another"}, "InvalidAudience"),
        ({"aud": [f"{AUDIENCE}2"]}, "InvalidAudience"),
        ({"iss": f"{ISSUER}/"}, "InvalidIssuer"),
        ({"sub": 7}, "InvalidSubject"),
        ({"sub": ""}, "malformed"),
        ({"azp": ["app"]}, "malformed"),
        *(({"without": claim}, "MissingRequiredClaim") for claim in ("exp", "sub", "iss", "aud")),
    ],
    ids=str,
)
async def test_a_token_that_says_the_wrong_thing(
    claims: dict[str, Any], word: str, tokens: Tokens, issuer: Issuer
) -> None:
    assert await why(tokens, issuer.token(**claims)) == word


async def test_a_token_for_ever_is_none(tokens: Tokens, issuer: Issuer) -> None:
    assert await why(tokens, issuer.token(exp=10**400)) == "malformed"  # more than a float holds


async def test_what_nobody_has_signed(tokens: Tokens, issuer: Issuer) -> None:
    good = issuer.token()
    head, body, signature = good.split(".")
    other = issuer.token("eve").split(".")[1]
    forged = Issuer(issuer.kid).token()
    assert await why(tokens, f"{head}.{other}.{signature}") == "InvalidSignature"
    assert await why(tokens, f"{head}.{body}.") == "InvalidSignature"
    assert await why(tokens, forged) == "InvalidSignature"
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": 9_999_999_999}
    assert await why(tokens, jwt.encode(claims, "", algorithm="none")) == "algorithm"
    # The public key as a shared secret.
    public = issuer.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "kid": issuer.kid}, claims)]
    signed = b".".join(base64url_encode(part) for part in parts)
    mac = base64url_encode(hmac.digest(public, signed, "sha256"))
    assert await why(tokens, f"{signed.decode()}.{mac.decode()}") == "algorithm"
    # An algorithm that exists, with a key of ours, but is not allowed.
    other_key = rsa.generate_private_key(65537, 2048)
    assert await why(tokens, jwt.encode(claims, other_key, "RS256", headers={"kid": issuer.kid})) == "algorithm"


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "a.b.c", "x" * 100, "\0", "eyJhbGciOiJFUzI1NiJ9.e30.", "é.é.é", "e30.e30.e30", "bnVsbA.e30."],
)
async def test_what_is_no_token(text: str, tokens: Tokens) -> None:
    with pytest.raises(BadToken):
        await tokens.read(text)


async def test_a_token_is_bounded(tokens: Tokens, issuer: Issuer) -> None:
    long = issuer.token(padding="x" * MAX_TOKEN)
    assert await why(tokens, long) == "too long"


async def test_keys_are_asked_for_once_and_then_now_and_again(
    tokens: Tokens, issuer: Issuer, source: Source
) -> None:
    source.open.clear()
    reads = [asyncio.create_task(tokens.read(issuer.token(f"u{number}"))) for number in range(50)]
    await asyncio.sleep(0)
    source.open.set()
    assert [(await read).subject for read in reads] == [f"u{number}" for number in range(50)]
    assert source.asked == 1
    source.now = LIFETIME - 1
    await tokens.read(issuer.token())
    assert source.asked == 1
    source.now = LIFETIME
    source.open.clear()
    await tokens.read(issuer.token())  # nobody waits for the new ones
    await asyncio.sleep(0)
    assert source.asked == 2
    source.open.set()
    await tokens.aclose()


async def test_a_new_key_is_found_at_once(tokens: Tokens, issuer: Issuer, source: Source) -> None:
    await tokens.read(issuer.token())
    source.now = PAUSE
    issuer.rotate("k2")
    source.content = issuer.jwks
    assert (await tokens.read(issuer.token("eve"))).subject == "eve"
    assert source.asked == 2


async def test_unknown_keys_are_no_amplifier(tokens: Tokens, issuer: Issuer, source: Source) -> None:
    await tokens.read(issuer.token())
    strangers = [Issuer(f"x{number}").token() for number in range(20)]
    for stranger in strangers:
        assert await why(tokens, stranger) == "unknown key"
    assert source.asked == 1
    source.now = PAUSE
    found = await asyncio.gather(*(why(tokens, stranger) for stranger in strangers))
    assert set(found) == {"unknown key"}
    assert source.asked == 2


async def test_a_withdrawn_key_is_believed_no_more(tokens: Tokens, issuer: Issuer, source: Source) -> None:
    old = issuer.token()
    await tokens.read(old)
    issuer.rotate("k2")
    source.content = issuer.jwks
    assert (await tokens.read(old)).subject == "ada"
    source.now = LIFETIME
    await tokens.read(old)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await why(tokens, old) == "unknown key"


async def test_an_outage_is_bridged_for_hours(tokens: Tokens, issuer: Issuer, source: Source) -> None:
    await tokens.read(issuer.token())
    source.broken = True
    source.now = KEPT - 1
    assert (await tokens.read(issuer.token())).subject == "ada"
    for _ in range(3):  # the request that nobody waits for fails
        await asyncio.sleep(0)
    assert source.asked == 2
    source.now = KEPT + PAUSE
    with pytest.raises(KeysUnavailable):
        await tokens.read(issuer.token())
    asked = source.asked
    for _ in range(10):
        with pytest.raises(KeysUnavailable):
            await tokens.read(issuer.token())
    assert source.asked == asked
    source.broken = False
    source.now += PAUSE
    assert (await tokens.read(issuer.token())).subject == "ada"


async def test_one_who_leaves_takes_no_keys_from_the_others(
    tokens: Tokens, issuer: Issuer, source: Source
) -> None:
    source.open.clear()
    first, second = (asyncio.create_task(tokens.read(issuer.token())) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    source.open.set()
    assert (await second).subject == "ada"
    assert source.asked == 1


@pytest.mark.parametrize("whole", [False, True], ids=["tokens", "access"])
async def test_a_request_under_way_is_given_up(
    whole: bool, tokens: Tokens, issuer: Issuer, source: Source
) -> None:
    source.open.clear()
    read = asyncio.create_task(tokens.read(issuer.token()))
    await asyncio.sleep(0)
    await (Access(Policy(()), tokens=tokens) if whole else tokens).aclose()
    with pytest.raises(asyncio.CancelledError):
        await read


async def test_a_verified_token_is_not_verified_again(
    tokens: Tokens, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, short = issuer.token(), issuer.token(seconds=-LEEWAY + 1)
    await tokens.read(good)
    await tokens.read(short)

    def verify(*_: object, **__: object) -> None:
        raise jwt.InvalidSignatureError

    monkeypatch.setattr(jwt, "decode", verify)
    assert (await tokens.read(good)).subject == "ada"
    monkeypatch.setattr("adapters.identity.tokens.time.time", lambda: 9_999_999_999.0)
    assert await why(tokens, good) == "InvalidSignature"  # it was looked at: what was known has expired


async def test_no_more_tokens_are_remembered_than_the_newest(
    tokens: Tokens, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.identity.tokens._REMEMBERED", 3)
    read = [issuer.token(sub=f"user {number}") for number in range(9)]
    for text in read:
        await tokens.read(text)
    assert len(tokens._seen) == 3

    def verify(*_: object, **__: object) -> None:
        raise jwt.InvalidSignatureError

    monkeypatch.setattr(jwt, "decode", verify)
    assert [(await tokens.read(text)).subject for text in read[-3:]] == ["user 6", "user 7", "user 8"]
    assert await why(tokens, read[0]) == "InvalidSignature"


def test_keys_that_can_not_be_used_are_left_out(issuer: Issuer) -> None:
    short = json.loads(RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 1024).public_key()))
    other = json.loads(ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1()).public_key()))
    entries = [
        issuer.jwk,
        {**issuer.jwk, "kid": "for encryption", "use": "enc"},
        {**issuer.jwk, "kid": "of another algorithm", "alg": "ES384"},
        {**issuer.jwk, "kid": "half", "y": None},
        {**issuer.jwk, "kid": 7},
        {**short, "kid": "short"},
        {**other, "kid": "of another curve"},
        {"kty": "oct", "kid": "shared", "k": "c2VjcmV0"},
        "nonsense",
        {},
    ]
    found = parse(json.dumps({"keys": entries}).encode(), frozenset({"ES256", "RS256"}))
    assert len(found) == 1
    assert found.find(issuer.kid, "ES256") is not None
    assert found.find(issuer.kid, "RS256") is None
    assert found.find(None, "ES256") is found.find(issuer.kid, "ES256")
    two = parse(json.dumps({"keys": [issuer.jwk, Issuer("k2").jwk]}).encode(), ES256)
    assert two.find(None, "ES256") is None


@pytest.mark.parametrize(
    "content", ["", "[]", "7", "{}", '{"keys": {}}', '{"keys": []}', '{"keys": [{}]}', "[" * 9_999]
)
def test_what_is_no_key_set(content: str) -> None:
    with pytest.raises(KeysFault):
        parse(content.encode(), ALGORITHMS)


def test_a_private_key_among_them_is_a_fault() -> None:
    private = json.loads(ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(KeysFault, match="private") as error:
        parse(json.dumps({"keys": [private]}).encode(), ES256)
    assert private["d"] not in str(error.value)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
async def test_every_algorithm_that_may_be_allowed_works(algorithm: str, tmp_path: Path) -> None:
    curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
    key: Any
    if algorithm == "EdDSA":
        key = ed25519.Ed25519PrivateKey.generate()
        jwk = OKPAlgorithm.to_jwk(key.public_key())
    elif algorithm in curves:
        key = ec.generate_private_key(curves[algorithm])
        jwk = ECAlgorithm.to_jwk(key.public_key())
    else:
        key = rsa.generate_private_key(65537, 2048)
        jwk = RSAAlgorithm.to_jwk(key.public_key())
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [json.loads(jwk)]}))
    allowed = frozenset({algorithm})
    tokens = Tokens(Keys(from_file(file), allowed), ISSUER, AUDIENCE, allowed)
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": 9_999_999_999}
    assert (await tokens.read(jwt.encode(claims, key, algorithm))).subject == "ada"
