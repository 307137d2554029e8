"""Secrets are kept out of texts and settings; nothing else is."""

from __future__ import annotations

import pytest

from svl.text.redaction import HIDDEN, is_secret_name, redact_text, redact_values


@pytest.mark.parametrize(
    "name",
    ["password", "tracker.password", "hf_token", "evaluator.options.hf_token", "api_key", "+tracker.api-key", "API_KEY",
     "client_secret", "aws.credentials", "wandb_key", "access_token", "key", "accessToken", "clientSecret",
     "privateKey", "headers.Authorization", "api_keys", "hf_tokens", "X-Amz-Signature", "smtp.pass"],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["max_new_tokens", "model.image_token", "calibration.image_table.column", "keys", "monkey", "benchmark.tasks",
     "visual_tokens", "token_type", "samples", "", "new_tokens", "one pass"],
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
        ("uri=https://host/?access_token=hunter2&page=2", "uri=https://host/?access_token=***&page=2"),
        ("x=https://blob/x?sig=hunter2#token=hunter2", "x=https://blob/x?sig=***"),
        ("https://user:hun@ter2@host/x", "https://***@host/x"),
        ("https://user:hunter2/x?#@host/x", "https://***@host/x"),
        ("http://localhost:5000/x@y", "http://localhost:5000/x@y"),
        ("options={a: 1, accessToken: hunter2, n: 2}", "options={a: 1, accessToken: ***, n: 2}"),
        ("api_keys=[hunter2, hunter2] credentials={user: u, value: hunter2}", "api_keys=*** credentials=***"),
        ("headers={Authorization: 'Bearer hunter2hunter2'}", "headers={Authorization: ***}"),
        ("Authorization: Bearer hunter2hunter2 sent", "Authorization: *** sent"),
        ("curl -H Bearer hunter2hunter2", "curl -H Bearer ***"),
        ("svl --password hunter2 --name run", "svl --password *** --name run"),
        ("AKIAHUNTER2HUNTER2AA glpat-hunter2hunter2hunter2", "*** ***"),
        ("eyJhbGciOiJI.eyJodW50ZXIyIjoi.aHVudGVyMmh1bnRlcjI", "***"),
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
    assert redact_values({"credentials": {"user": "hunter2", "all": ["hunter2"]}}) == {
        "credentials": {"user": HIDDEN, "all": [HIDDEN]}
    }
    assert redact_values([{"name": "password", "value": "hunter2"}, {"name": "n", "value": 3}]) == [
        {"name": "password", "value": HIDDEN}, {"name": "n", "value": 3},
    ]  # fmt: skip
    assert redact_values({"password": 1234, "use_auth": True}) == {"password": HIDDEN, "use_auth": True}
    assert found["options"] == [{"password": HIDDEN}, "a=1", 3, None]
    assert {name: found[name] for name in ("model", "layers", "api_key")} == {
        name: settings[name] for name in ("model", "layers", "api_key")
    }
