"""Secrets are kept out of texts and settings; nothing else is."""

from __future__ import annotations

import pytest

from svl.text.redaction import HIDDEN, is_secret_name, redact_text, redact_values


@pytest.mark.parametrize(
    "name",
    ["password", "tracker.password", "hf_token", "evaluator.options.hf_token", "api_key", "+tracker.api-key", "API_KEY",
     "client_secret", "aws.credentials", "wandb_key", "access_token", "key"],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["max_new_tokens", "model.image_token", "calibration.image_table.column", "keys", "monkey", "benchmark.tasks",
     "visual_tokens", "token_type", "samples", ""],
)  # fmt: skip
def test_names_of_other_settings(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tracker.uri=http://user:hunter2@host:5000/x", "tracker.uri=http://***@host:5000/x"),
        ("cannot reach 'postgresql://me:hunter2@db/x'", "cannot reach 'postgresql://***@db/x'"),
        ("https://hunter2@host", "https://***@host"),
        ("+evaluator.options.hf_token=hunter2 ratio=0.25", "+evaluator.options.hf_token=*** ratio=0.25"),
        ("password='hunter2, too' ratio=0.25", "password=*** ratio=0.25"),
        ("{'api_key': 'hunter2', 'n': 1}", "{'api_key': ***, 'n': 1}"),
        ("api_key: hunter2\nname: run", "api_key: ***\nname: run"),
        ("GET /x?token=hunter2&page=2", "GET /x?token=***&page=2"),
        ("hf_hunter2hunter2hunter2hunter2 is no token", "*** is no token"),
        ("strategy=tail ratio=0.25 model.image_token=<image>", "strategy=tail ratio=0.25 model.image_token=<image>"),
        ("benchmark.max_new_tokens=16", "benchmark.max_new_tokens=16"),
        ("api_key=null token: ${oc.env:HF_TOKEN}", "api_key=null token: ${oc.env:HF_TOKEN}"),
        ("mail me@host, see https://host/@me", "mail me@host, see https://host/@me"),
    ],
)
def test_texts(text, shown):
    assert redact_text(text) == shown
    assert redact_text(shown) == shown


def test_settings():
    settings = {
        "tracker": {
            "uri": "http://u:hunter2@host",
            "token": "hunter2",
            "project": "x",
            "headers": {"api_key": "hunter2"},
        },
        "model": {"image_token": "<image>", "trust_remote_code": False},
        "options": [{"password": "hunter2"}, "a=1", 3, None],
        "layers": (1, 2),
        "api_key": None,
    }
    found = redact_values(settings)
    assert "hunter2" not in str(found)
    assert found["tracker"] == {
        "uri": f"http://{HIDDEN}@host", "token": HIDDEN, "project": "x", "headers": {"api_key": HIDDEN},
    }  # fmt: skip
    assert found["options"] == [{"password": HIDDEN}, "a=1", 3, None]
    assert {name: found[name] for name in ("model", "layers", "api_key")} == {
        name: settings[name] for name in ("model", "layers", "api_key")
    }
