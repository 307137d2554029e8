"""Secrets (passwords, tokens, keys of servers) kept out of everything that is written or shown.

A value is a secret by the name of its setting, by standing in an address (`http://user:password@host`, `?token=...`),
or by the look of a well-known token. Its place shows as `***`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_SECRET_WORDS = {
    *("password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey"),
    *("authorization", "signature", "cookie", "jwt"),
}
_LAST_WORDS = {"token", "key", "auth", "sig", "sas", "pat"}  # of a name: hf_token, api_key; not token_count
_KINDS = {"access", "api", "auth", "hf", "private", "secret"}  # before tokens and keys of which a setting holds several
_HARMLESS = {"image_token", "svl.key"}  # settings of svl that are named like secrets

_IN_ADDRESS = (
    re.compile(r"(?<=://)[^\s/?#'\"]{1,400}@"),  # user:password@host
    re.compile(r"(?<=://)[^\s/?#'\"@:]{1,100}:(?!\d+(?:[/?#]|$))[^\s'\"@]{1,200}@"),  # a password that holds / ? or #
)
_NAME = re.compile(r"""(?<![\w.\-])(?P<name>[\w.\-]+)(?P<sign>["']?\s*[=:]\s*|(?<=\w)\s+)""")
_VALUE = re.compile(
    r"""\$\{[^}]*\}|"[^"]*"|'[^']*'|\{[^{}]*\}|\[[^\[\]]*\]|(?:(?:Bearer|Basic)\s+)?[^\s,;&'"(){}\[\]]+"""
)
_KNOWN_FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w\-]{16,}|sk-[A-Za-z0-9_\-]{20,}"
    r"|xox[a-z]-[\w\-]{10,}|wandb_v\d_\w{20,}|A(?:KIA|SIA)[A-Z0-9]{16}|AIza[\w\-]{30,}"
    r"|eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]{8,})"
)
_BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/=\-]{8,}")
_NO_SECRET = {"", "null", "none", "???", "true", "false"}


def is_secret_name(name: str) -> bool:
    """Whether a setting of this (dotted) name holds a secret."""
    name = name.lstrip("+~-")
    lowered = name.lower()
    if any(lowered == harmless or lowered.endswith(f".{harmless}") for harmless in _HARMLESS):
        return False
    last = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(".")[2])  # accessToken is access_token
    words = re.findall(r"[a-z0-9]+", last.lower())
    if not words:
        return False
    if words[-1] == "pass" and "." in name:  # of a setting, not of a sentence
        return True
    is_several = len(words) > 1 and words[-1] in ("tokens", "keys") and words[-2] in _KINDS
    return is_several or words[-1] in _LAST_WORDS or not _SECRET_WORDS.isdisjoint(words)


def redact_text(text: str) -> str:
    """`text` without the secrets in it: `name=value`, `name: value`, `--name value`, addresses, well-known tokens."""
    for form in _IN_ADDRESS:
        text = form.sub(f"{HIDDEN}@", text)
    return _BEARER.sub(rf"\1{HIDDEN}", _KNOWN_FORM.sub(HIDDEN, _without_named(text)))


def _without_named(text: str) -> str:
    """`text` without the values of secret names, also of those that stand in another name's value."""
    parts, at = [], 0
    while found := _NAME.search(text, at):
        parts.append(text[at : found.end()])
        at = found.end()
        is_option = not found["sign"].strip()
        if is_option and not found["name"].startswith("--"):
            continue
        if is_secret_name(found["name"]) and (value := _VALUE.match(text, at)) and not _is_no_secret(value[0]):
            parts.append(HIDDEN)
            at = value.end()
    return "".join([*parts, text[at:]])


def _is_no_secret(value: str) -> bool:
    plain = value.strip("'\"")
    return plain.lower() in _NO_SECRET or plain.startswith("${") or plain == HIDDEN


def redact_values(value: Any, name: str = "", hidden: bool = False) -> Any:
    """Nested settings without the secrets in them.

    Args:
        value: plain values, mappings and lists.
        name: the dotted name of `value`.
        hidden: whether everything in it is secret, because it stands in a secret setting.
    """
    hidden = hidden or is_secret_name(name)
    if isinstance(value, Mapping):
        named = {str(value.get(label)) for label in ("name", "key")}  # of {name: password, value: ...}
        return {
            key: redact_values(
                inner,
                f"{name}.{key}" if name else str(key),
                hidden or (key == "value" and any(map(is_secret_name, named))),
            )
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(redact_values(inner, name, hidden) for inner in value)
    if hidden and value is not None and not isinstance(value, bool) and not _is_no_secret(str(value)):
        return HIDDEN
    return redact_text(value) if isinstance(value, str) else value
