"""Secrets: recognised by name or value, and removed from text that is shown or stored."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "********"

_SHORTEST = 8
"""Shorter values of secret variables (``true``, ``0``) are no secrets.
They occur by chance in other text."""

_SECRET_WORDS = frozenset(
    {
        *(
            "KEY",
            "KEYS",
            "APIKEY",
            "APIKEYS",
            "TOKEN",
            "PAT",
            "JWT",
            "OTP",
            "BEARER",
            "AUTH",
            "AUTHORIZATION",
            "DSN",
            "WEBHOOK",
        ),
        *("PASS", "PASSCODE", "PASSWRD", "PWD", "PW", "CRED", "CREDS", "COOKIE", "COOKIES"),
    }
)
"""Words that make a name secret: ``HF_TOKEN``, ``GITHUB_PAT``, ``SENTRY_DSN``."""

_PARTS = ("SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CONNECTIONSTRING")
"""Parts that make a name secret, without separators: ``DBPASSWORD``."""

_ENDINGS = re.compile(
    r"(?:TOKEN|(?:API|ACCESS|SECRET|PRIVATE|AUTH|ACCOUNT|SIGNING|ENCRYPTION|DEPLOY|LICENSE|SSH|SSL|TLS|HF|HUB|GH|GIT"
    r"|WANDB|OPENAI|AWS|MASTER|SERVICE|SHARED|STORAGE|HMAC)KEYS?|(?<!BY)(?<!COM)(?<!TRES)(?<!SUR)(?<!MULTI)PASS)$"
)
"""Endings of secret names: ``HFTOKEN``, ``S3_ACCESSKEY``, ``SSHPASS``; not ``MONKEY``."""

_PLURAL_TOKENS = re.compile(
    r"(?:^|_)(?:API|AUTH|ACCESS|BEARER|REFRESH|SESSION|SECRET|USER|HF|GH|GITHUB|GITLAB)_?TOKENS$"
)
"""``tokens`` alone is what a language model counts."""

_PLACES = frozenset({"FILE", "FILES", "PATH", "PATHS", "DIR", "DIRS", "FOLDER", "SOCK", "SOCKET", "VARIABLE"})
"""Endings of names that only locate a secret: ``SSH_AUTH_SOCK``, ``HF_TOKEN_PATH``."""

_NAMES_OF_SECRETS = frozenset({"secret", "pods_secret", "keys_from", "image_pull_secrets"})
"""Options with the name of a Secret in a cluster, not with its content."""

_HARMLESS = frozenset({"PWD", "OLDPWD", "GOOGLE_APPLICATION_CREDENTIALS", "NUM_KEY_VALUE_HEADS"})
"""The shell's current and last folder, the path of a file, and a size of models."""

# Texts of peers may be megabytes: every pattern begins at a place that is found at once, or has a longest match, so
# that its time grows with the text and not with the square of it.
_SHAPES = (
    # a password in an address, one with a slash in it too; a user name that is a key (Sentry's)
    re.compile(r"(?P<before>(?<=[A-Za-z0-9+.-])://[^\s/:@\"'<>]*+:)(?P<secret>[^\s/\"'<>]+)(?=@)"),
    re.compile(
        r"(?P<before>(?<=[A-Za-z0-9+.-])://[^\s/:@\"'<>]*+:)(?!\d+/)"
        r"(?P<secret>[^\s/@\"'<>]{0,128}/[^\s@\"'<>]{0,256})(?=@)"
    ),
    re.compile(r"(?P<before>(?<=[A-Za-z0-9+.-])://)(?P<secret>(?=[\w-]*?\d)[\w-]{20,})(?=@)"),
    # the same without a scheme: user:password@host:port, not slots of hosts (a:0,1@b:22), and no time or e-mail address
    re.compile(
        r"(?P<before>(?<![\w.:@/%+-])(?!(?:mailto|sips?|xmpp|acct|npm|pkg|urn):)[^\s/:@,;=\"'<>()\[\]{}]{1,128}+:)"
        r"(?![\d.,-]{1,5}@)(?P<secret>[^\s/:@\"'<>]{1,512}+)"
        r"(?=@(?:(?:[A-Za-z][\w.-]{0,253}|\d{1,3}(?:\.\d{1,3}){3}|\[[\da-fA-F:]{1,45}\]):\d{2,5}(?!\w)"
        r"|[\w.-]{1,253}\.[A-Za-z]{2,24}/))"
    ),
    # signed addresses and headers
    re.compile(
        r"(?P<before>[?&;](?:X-Amz-Signature|X-Amz-Security-Token|X-Goog-Signature|sig|signature|access_token|auth_token"
        r"|token|api_key|apikey|password|secret)=)(?P<secret>[^\s&\"'<>#]+)",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<before>\bhooks\.slack\.com/(?:services|workflows)/)(?P<secret>[\w/-]{8,})"),
    re.compile(r"(?P<before>\b(?:Bearer|Basic) )(?P<secret>(?=\S*[\d=])[\w.~+/-]{16,}=*)"),
    re.compile(
        r"(?P<before>\bAuthorization[\"']?\s*[:=]\s*[\"']?(?:Bearer|Basic|Token)\s+)(?P<secret>[^\s\"',}*]+)",
        re.IGNORECASE,
    ),
    # private keys, and tokens whose beginning says whose they are
    re.compile(
        r"(?P<before>)(?P<secret>-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[A-Za-z0-9+/=\s\\:,]*"
        r"(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----)?)"
    ),
    re.compile(
        r"(?P<before>)(?<![A-Za-z0-9_-])(?P<secret>"
        r"gh[opusr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{16,}"
        r"|sk-[A-Za-z0-9]{16,}|sk-(?:proj|ant|svcacct|or|lf)-[\w-]{8,}|sk-(?=[\w-]*\d)[\w-]{16,}"
        r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}|xox[a-z]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}"
        r"|A(?:KIA|SIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{16,}"
        r"|SG\.[\w-]{16,}\.[\w-]{16,}|dop_v1_[a-f0-9]{32,}|nvapi-[\w-]{16,}|wandb_v1_\w{16,}"
        r"|eyJ[\w-]{8,}\.[\w-]{2,}\.[\w-]*)"
    ),
)
_ASSIGNED = re.compile(
    r"(?<![\w$])(?P<name>[A-Za-z][\w.-]{0,127}+)=(?P<value>\"[^\"]*\"|'[^']*'|[^\s,;}\]\"']*[^\s,;}\]\"':])"
)
_LOGIN = re.compile(r"(?<![\w.%/@-])[^\s/:@,=]+:(?!\d{1,5}@)[^\s/:@,]+@[A-Za-z\d\[]")
"""``user:password@host``, in an argument of a program that reaches hosts."""
_SSH_KEYWORDS = frozenset(
    (
        *("addkeystoagent", "hostkeyalgorithms", "hostkeyalias", "stricthostkeychecking", "updatehostkeys"),
        *("verifyhostkeydns", "passwordauthentication", "numberofpasswordprompts", "securitykeyprovider"),
        *("pubkeyauthentication", "gssapidelegatecredentials", "obscurekeystroketiming"),
    )
)
"""Options of OpenSSH that hold no secret although their names sound so."""
_BARE_PROXY = re.compile(r"[^\s/:@]*:[^\s/@]+@[^\s/@]+/?")
"""``user:password@host:port``, which curl and requests take as a proxy without a scheme."""
_HEADER = re.compile(r"\s*(?:(?P<bearer>Bearer)|Basic)\s+(?P<secret>[\w.~+/-]+=*)\s*", re.IGNORECASE)
"""The whole value of an ``Authorization`` header (RFC 6750, RFC 7617).
Its secret may be short."""
_ENTRY = re.compile(
    r"(?P<name>(?:^|[{,])[ \t]*[\"']?(?P<word>[A-Za-z]\w*)[\"']?: ?)"
    r"(?P<value>\"[^\"]*\"|'[^']*'|[^\s,}\]\"'][^,}\]\n\"']*)",
    re.MULTILINE,
)
"""A variable in YAML or JSON.
A name with dots is an option in an error, and prose follows it."""


@functools.lru_cache(1024)  # each text of a run is compared with every variable
def is_secret_name(name: str) -> bool:
    """Return whether a variable's name is that of a secret (``HF_TOKEN``, not ``MONKEY``)."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # accountKey
    upper = re.sub(r"[^A-Z0-9]+", "_", parts.upper()).strip("_")
    words = upper.split("_")
    if upper in _HARMLESS or words[-1] in _PLACES or "PER_TOKEN" in upper:
        return False
    joined = "".join(words)
    return (
        not _SECRET_WORDS.isdisjoint(words)
        or any(part in joined for part in _PARTS)
        or any(_ENDINGS.search(word) for word in words)
        or _PLURAL_TOKENS.search(upper) is not None
    )


def is_secret_value(value: str) -> bool:
    """Return whether text has the form of a secret.

    That is a password in an address, a known token, a private key.
    """
    return _without_shapes(value) != value


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable is a secret by its name or its value (``AccountKey=…``)."""
    has_assigned = _ASSIGNED.sub(_hide_assigned, value) != value
    by_value = is_secret_value(value) or has_assigned or _is_authorization(value)
    return is_secret_name(name) or by_value or _is_proxy_with_password(name, value)


def is_secret_argument(word: str) -> bool:
    """Return whether a command-line word holds a secret: ``-oPassword=…``, ``-Juser:pass@host``."""
    option, equals, value = word.partition("=")
    name = re.sub(r"^(-o\s*|-+)", "", option)
    if is_secret_value(word) or _LOGIN.search(word):
        return True
    if not equals or name.lower() in _SSH_KEYWORDS:
        return False
    return is_secret(name, value) or is_secret_argument(value)


def secret_variable_in(text: str, environ: Mapping[str, str]) -> str | None:
    """Return the name of a secret variable whose value is in ``text``, or ``None``."""
    found = (name for name, value in _secrets_of(environ).items() if value in text and not _is_path(value))
    return next(found, None)


def _is_path(value: str) -> bool:
    """Return whether a value names a file (``SSH_KEY=~/.ssh/id``), as options may do too."""
    return value.startswith(("/", "~", "./", "../"))


def hide_secrets(text: str) -> str:
    """Return ``text`` with each secret replaced, found by form or by name (``HF_TOKEN=…``)."""
    return _ENTRY.sub(_hide_entry, _ASSIGNED.sub(_hide_assigned, _without_shapes(text)))


def redact(tree: Any, environ: Mapping[str, str]) -> Any:
    """Return ``tree`` with every secret in its text replaced.

    Args:
        tree: plain data. Text under a key that names a secret is hidden whole.
        environ: values of its secret variables are hidden wherever they occur.
    """
    return _redacted(tree, sorted(set(_secrets_of(environ).values()), key=len, reverse=True))


def _secrets_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables whose whole value is a secret."""
    return {
        name: value
        for name, value in environ.items()
        if len(value) >= _SHORTEST
        and (is_secret_name(name) or _is_proxy_with_password(name, value) or _is_authorization(value))
    }


def _is_proxy_with_password(name: str, value: str) -> bool:
    return name.upper().endswith("PROXY") and _BARE_PROXY.fullmatch(value) is not None


def _is_authorization(value: str) -> bool:
    """Return whether text is ``Bearer TOKEN``, or ``Basic`` with an encoded ``user:password``."""
    header = _HEADER.fullmatch(value)
    if header is None or header["bearer"]:
        return header is not None
    try:
        return b":" in base64.b64decode(header["secret"], validate=True)
    except ValueError:
        return False


def _redacted(tree: Any, known: list[str]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _redacted_under(str(key), value, known) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_redacted(value, known) for value in tree]
    if isinstance(tree, str):
        for secret in known:
            tree = tree.replace(secret, HIDDEN)
        return hide_secrets(tree)
    return tree


def _redacted_under(key: str, value: Any, known: list[str]) -> Any:
    is_secret_here = isinstance(value, str) and value and (_is_secret_key(key) or _is_authorization(value))
    return HIDDEN if is_secret_here else _redacted(value, known)


def _without_shapes(text: str) -> str:
    for shape in _SHAPES:
        text = shape.sub(rf"\g<before>{HIDDEN}", text)
    return text


def _hide_assigned(found: re.Match[str]) -> str:
    """Hide the value in ``NAME=value``; ``key=value`` is grammar, not a variable."""
    last = found["name"].rpartition(".")[2]
    if last.removeprefix("o").lower() in _SSH_KEYWORDS:
        return found[0]
    is_secret_here = _is_secret_key(last) or last in ("password", "passwd", "passphrase")
    return f"{found['name']}={_hidden(found['value'])}" if is_secret_here else found[0]


def _hide_entry(found: re.Match[str]) -> str:
    """Hide the value in ``NAME: value``."""
    is_secret_here = _is_secret_key(found["word"]) or _is_authorization(found["value"].strip("\"'"))
    return f"{found['name']}{_hidden(found['value'])}" if is_secret_here else found[0]


def _is_secret_key(key: str) -> bool:
    """Return whether a key of a tree names a secret."""
    if key in _NAMES_OF_SECRETS:
        return False
    return (key.isupper() or "_" in key or "-" in key or key != key.lower()) and is_secret_name(key)


def _hidden(value: str) -> str:
    """Return the replacement of a value, in its quotes."""
    quote = value[0] if value[0] in "\"'" else ""
    return f"{quote}{HIDDEN}{quote}"
