"""Secrets (passwords, tokens, keys of servers) kept out of everything that is written or shown.

A value is a secret by the name of its setting, by standing in an address (`http://user:password@host`, `?token=...`),
or by the look of a well-known token. Its place shows as `***`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_SECRET_WORDS = {"password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey"}
_LAST_WORDS = {"token", "key", "auth"}  # of a name: hf_token, api_key; not token_count
_HARMLESS = {"image_token", "svl.key"}  # settings of svl that are named like secrets

_USER_IN_ADDRESS = re.compile(r"(?<=://)[^\s/?#@'\"]+@")
_NAMED = re.compile(
    r"""(?P<name>[\w.\-]+)(?P<sign>["']?\s*[=:]\s*)"""
    r"""(?P<value>\$\{[^}]*\}|"[^"]*"|'[^']*'|[^\s,;&'"(){}\[\]]+)"""
)
_KNOWN_FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|xox[a-z]-[\w\-]{10,})"
)
_NO_SECRET = {"", "null", "none", "???", "true", "false"}


def is_secret_name(name: str) -> bool:
    """Whether a setting of this (dotted) name holds a secret."""
    lowered = name.lower().lstrip("+~")
    if any(lowered == harmless or lowered.endswith(f".{harmless}") for harmless in _HARMLESS):
        return False
    words = re.findall(r"[a-z0-9]+", lowered.rpartition(".")[2])
    return bool(words) and (words[-1] in _LAST_WORDS or not _SECRET_WORDS.isdisjoint(words))


def redact_text(text: str) -> str:
    """`text` without the secrets in it: `name=value` and `name: value`, addresses, well-known tokens."""
    text = _USER_IN_ADDRESS.sub(f"{HIDDEN}@", text)
    text = _NAMED.sub(_hide_named, text)
    return _KNOWN_FORM.sub(HIDDEN, text)


def _hide_named(found: re.Match[str]) -> str:
    value = found["value"].strip("'\"")
    if not is_secret_name(found["name"]) or value.lower() in _NO_SECRET or value.startswith("${"):
        return found[0]
    return f"{found['name']}{found['sign']}{HIDDEN}"


def redact_values(value: Any, name: str = "") -> Any:
    """Nested settings without the secrets in them; `name` is the dotted name of `value`."""
    if isinstance(value, Mapping):
        return {key: redact_values(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_values(inner, name) for inner in value)
    if is_secret_name(name) and isinstance(value, str | bytes) and str(value).lower() not in _NO_SECRET:
        return value if str(value).startswith("${") else HIDDEN
    return redact_text(value) if isinstance(value, str) else value
