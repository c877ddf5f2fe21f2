"""Tokens that stand for a key for a day (JSON Web Tokens, RFC 7519), signed with what is stored of that very key.

So there is no further secret to keep: revoking the key ends its tokens, and nobody can make one without the database or
the key itself.
"""

import time

import jwt

from selfloop.types.errors import Denied

_LIFE_S = 86400
_ALGORITHM = "HS256"
_ISSUER = "selfloop"
# The base64 of a JSON object's first bytes.
_BEGINNING = "eyJ"


def is_token(given: str) -> bool:
    return given.startswith(_BEGINNING) and given.count(".") == 2


def issue(key_id: str, key_sha256: str, team_id: str, expires_at: float | None) -> str:
    """A token for a key; it ends with the key, if that expires within the day."""
    now = int(time.time())
    end = now + _LIFE_S if expires_at is None else min(now + _LIFE_S, int(expires_at))
    claims = {"iss": _ISSUER, "sub": f"{_ISSUER}:key:{key_id}", "key_id": key_id, "org_id": team_id}
    return jwt.encode(claims | {"email": "", "iat": now, "exp": end}, key_sha256, algorithm=_ALGORITHM)


def key_id_of(token: str) -> str:
    """The key that a token says it stands for, to be checked with :func:`verify`. Raises :class:`Denied`."""
    try:
        claims = jwt.decode(token, options={"verify_signature": False})
    except jwt.InvalidTokenError:
        raise Denied("this token is not one of this server's") from None
    return str(claims.get("key_id", ""))


def verify(token: str, key_sha256: str) -> float:
    """When it ends, in UNIX seconds. Raises :class:`Denied` unless it was issued for this key and has not ended yet."""
    try:
        claims = jwt.decode(
            token, key_sha256, algorithms=[_ALGORITHM], issuer=_ISSUER, options={"require": ["exp", "iat"]}
        )
    except jwt.ExpiredSignatureError:
        raise Denied("this token has expired: exchange the key for another") from None
    except jwt.InvalidTokenError:
        raise Denied("this token is not one of this server's") from None
    return float(claims["exp"])
