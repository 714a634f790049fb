"""The kinds of places that a config may name: local paths, fsspec URLs, `pipe:` commands.

URLs and commands may hold secrets; `masked` keeps these out of everything shown or recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

PIPE = "pipe:"
FOLDER = "folder:"
"""What a shard of a folder of pictures begins with, in a plan; no config has it."""
GLOB = re.compile(r"[*?\[]")
"""Characters that make a path a pattern."""
MASK = "***"
_CHAIN = re.compile(r"^\w+::|::(\w+::)*\w+://")


def is_pipe(url: str) -> bool:
    return url.startswith(PIPE)


def is_remote(url: str) -> bool:
    """Whether fsspec opens a URL."""
    return "://" in url and not is_pipe(url)


def is_local(url: str) -> bool:
    return not is_pipe(url) and not is_remote(url) and not is_folder(url)


def is_folder(url: str) -> bool:
    """Whether a shard is a slice of a folder, which `run.slices` reads."""
    return url.startswith(FOLDER)


def scheme(url: str) -> str:
    """The scheme of a URL's store, without wrappers (`simplecache::s3://...`)."""
    return url.partition("://")[0].rpartition("::")[2]


def is_chained(url: str) -> bool:
    """Whether fsspec opens a URL through several stores; else `::` is a part of a file's name."""
    return _CHAIN.search(url) is not None


def masked(text: str) -> str:
    """Put `***` in place of the secrets in a text's URLs and commands; twice is the same as once.

    `https://me:pw@host/a.tar?sig=x` becomes `https://***@host/a.tar?sig=***`. Secrets are passwords
    before a host, headers, and query parameters, options and variables with a secret's name. The
    time is linear in the text's length.
    """
    if not (_MARK.search(text) and _HINT.search(text)):
        return text
    text = _PASSWORD.sub(_without_password, text)
    text = _ODD_PASSWORD.sub(_without_password, text)
    for before, choose in _RULES:
        text = _without_values(text, before, choose)
    return text


def masked_all(values: Any) -> Any:
    """Mask the texts in a config's values, and the values of keys with a secret's name."""
    if isinstance(values, str):
        return masked(values)
    if isinstance(values, dict):
        named = {k: masked(f"{k}={v}") for k, v in values.items() if isinstance(v, str)}
        texts = {k: text[len(f"{k}=") :] for k, text in named.items()}
        return {k: texts[k] if k in texts else masked_all(v) for k, v in values.items()}
    return [masked_all(v) for v in values] if isinstance(values, list | tuple) else values


def has_secret(values: Any) -> bool:
    """Whether any text in a config's values holds a secret."""
    return bool(masked_all(values) != values)


_MARK = re.compile(r"[@:=%\s]")
"""One of these stands before or after every secret; few of a million paths have any."""
_HINT = re.compile(
    r"://|=|%3d|auth|bearer|cookie|credential|hmac|jwt|key|pass|pwd|secret|session|sig|token"
    r"|(?<![\w-])-(?:-header|-user|-proxy|[a-z]*[hu])",
    re.IGNORECASE,
)
"""A text without any of these holds no secret."""
_PASSWORD = re.compile(r"(?<=://)([^\s/?#\"<>]*)@")
_ODD_PASSWORD = re.compile(r"(?<=://)([^\s/?#@:\[]+:(?!\d*(?:[/?#]|$))(?:(?!://)[^\s@])*)@")
"""A password with a slash, which URLs should not have; `host:80/a@b` has none."""


def _without_password(found: re.Match[str]) -> str:
    user, colon, _ = found[1].partition(":")
    before = found.string[max(0, found.start() - 8) : found.start()].lower()
    if before.endswith(("http://", "https://")):  # a token often takes the place of the user
        return f"{MASK}@" if found[1] else found[0]
    is_name = user == "arn" and "/" in found[1]  # Amazon's, with an @ in an object's name
    return f"{user}:{MASK}@" if colon and not is_name else found[0]


_WHOLE = {"auth", "jwt", "pass", "pwd", "sas", "sig"}
_ENDS = (
    *("apikey", "accesskey", "accountkey", "authkey", "privatekey", "secretkey", "sharedkey"),
    *("subscriptionkey", "authorization", "cookie", "credential", "credentials", "hmac"),
    *("passphrase", "passwd", "password", "secret", "sessionid", "signature", "token"),
)
_HEADERS = {"authorization", "proxyauthorization", "cookie", "setcookie"}
_HARMLESS = {
    *("accept", "acceptencoding", "acceptlanguage", "cachecontrol", "connection", "contenttype"),
    *("host", "origin", "range", "referer", "useragent"),
}
"""A command's headers that hold no secret; any other may."""


def _flat(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


@lru_cache(maxsize=1000)
def _is_secret(name: str) -> bool:
    """Whether a name is that of a secret: `X-Amz-Signature`, `api_key`, `HF_TOKEN`."""
    is_variable = name.isupper() and name.endswith("_KEY")
    return (
        is_variable or _flat(name).endswith(_ENDS) or re.split("[-_.]", name.lower())[-1] in _WHOLE
    )


_PLAIN = r"""(?:\\.|[^\s&'"\\]|['"](?=\w))*+"""
_VALUE = re.compile(
    rf"""[bru]?(?:'(?!\s|$)[^'\n]*+'?|"(?!\s|$)(?:\\.|[^"\\\n])*+"?)(?:(?=\w){_PLAIN})?|{_PLAIN}"""
)
"""The rest of a word, or of a quoted text."""
_REST = {
    "'": re.compile(r"[^'\n]*"),
    '"': re.compile(r'(?:\\.|[^"\\\n])*'),
    "": re.compile(r"[^'\"\n]*"),
}
"""The rest of a line, or of quotes that began before."""
_FILE = re.compile(r"[^\s&'\"]*?(?:/|%2[fF]|\.\w{1,5}(?![^\s&'\"]))", re.ASCII)
"""The name of an object, which a parameter `key` may also hold."""
Choice = re.Pattern[str] | None
"""The pattern of the secret value; None where the value is no secret."""


def _assigned(found: re.Match[str]) -> Choice:
    """Choose for `name=value`, in a query or a command."""
    text, start = found.string, found.start()
    if _flat(found[1]) == "key" and text[start - 1 : start] in ("?", "&"):
        return None if _FILE.match(text, found.end()) else _VALUE
    return _VALUE if _is_secret(found[1]) else None


def _named(found: re.Match[str]) -> Choice:
    """Choose for `Name: value` of HTTP or `"name": "value"` of JSON; not for prose such as `bad
    token: x`."""
    name, text, start = found[1], found.string, found.start()
    if found[2]:
        return _VALUE if _is_secret(name) else None
    if _flat(name) in _HEADERS or (re.search("[-_]", name) and _is_secret(name)):
        return _rest(text[start - 1 : start])
    return None


def _rest(quote: str) -> re.Pattern[str]:
    return _REST[quote if quote in _REST else ""]


_QUOTE = r"[= \t]*+(['\"]?)"
_RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Choice]], ...] = (
    (  # a command's header of any name
        re.compile(
            rf"(?<![\w-])(?:-[A-Za-z]*+(?<=H)|--(?:proxy-)?header){_QUOTE}([\w-]++)[ \t]*+:[ \t]*+"
        ),
        lambda found: None if _flat(found[2]) in _HARMLESS else _rest(found[1]),
    ),
    (re.compile(r"(?<![\w-])([\w-]++)(\\?['\"]?)[ \t]*+:[ \t]*+"), _named),
    (  # `-u user:password` of curl and the like
        re.compile(
            rf"(?<![\w-])(?:-[A-Za-z]*+(?<=[uU])|--(?:proxy-)?user){_QUOTE}[^\s:'\"/]*+:(?!//)"
        ),
        lambda found: _rest(found[1]) if found[1] else _VALUE,
    ),
    (re.compile(r"(?:(?<![\w.%-])|(?<=%26)|(?<=%3[fF]))([\w.-]++)(?:=|%3[dD])"), _assigned),
    (
        re.compile(r"(?<![\w-])--([\w-]++)[ \t]++(?!-)"),
        lambda found: _VALUE if _is_secret(found[1]) else None,
    ),
    (  # curl's cookie, not its cookie file
        re.compile(rf"(?<![\w-])(?:-b|--cookie){_QUOTE}(?=[\w.-]*+=)"),
        lambda found: _rest(found[1]) if found[1] else _VALUE,
    ),
    (re.compile(r"\bsshpass[ \t]++-p[ \t]*+"), lambda found: _VALUE),
    (re.compile(r"\b[bB]earer[ \t]++(?=[\w.~+/-]{0,99}\d)"), lambda found: _VALUE),
)
"""The text before a value, and how to tell whether the value is a secret."""


def _without_values(
    text: str, before: re.Pattern[str], choose: Callable[[re.Match[str]], Choice]
) -> str:
    parts, at = [], 0
    for found in before.finditer(text):
        start = found.end()
        if found.start() < at or text.startswith(MASK, start) or not (value := choose(found)):
            continue
        if (ended := value.match(text, start)) and ended[0].strip("*"):
            parts += [text[at:start], MASK]
            at = ended.end()
    return "".join([*parts, text[at:]]) if parts else text
