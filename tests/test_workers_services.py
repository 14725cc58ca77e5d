"""The servers are closed by default, and their password stays with its owner (row 22)."""

import json
import subprocess
import sys
import time
from base64 import b64encode
from http.client import HTTPConnection
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from workers_cases import ROOT, free_port, until

from drawplate.core.errors import UserError
from flows import request as form
from flows.services import USER, environment, secret, servers


def test_the_secret_is_random_and_only_its_owner_reads_it(tmp_path):
    first = secret(tmp_path / "a")
    file = tmp_path / "a/.drawplate/secret"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(first) == 48
    assert secret(tmp_path / "a") == first
    assert secret(tmp_path / "b") != first
    file.chmod(0o644)
    with pytest.raises(UserError, match="can be read by others"):
        secret(tmp_path / "a")


def test_both_servers_listen_on_loopback_and_know_a_password(tmp_path):
    password = secret(tmp_path)
    for command, given in servers(tmp_path, 1, 2):
        assert command[command.index("--host") + 1] == "127.0.0.1"
        assert password not in " ".join(command)
        assert "PREFECT_SERVER_API_AUTH_STRING" in given or "MLFLOW_AUTH_CONFIG_PATH" in given
    assert (tmp_path / ".drawplate/mlflow-auth.ini").stat().st_mode & 0o777 == 0o600


def test_two_projects_share_nothing_that_prefect_keeps(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    for root in (tmp_path / "a", tmp_path / "b"):
        (_, served), _ = servers(root, 1, 2)
        own = str(root / ".drawplate/prefect")
        assert served["PREFECT_HOME"] == environment(root)["PREFECT_HOME"] == own
    monkeypatch.setenv("PREFECT_HOME", "elsewhere")
    (_, served), _ = servers(tmp_path / "a", 1, 2)
    assert served["PREFECT_HOME"] == environment(tmp_path / "a")["PREFECT_HOME"] == "elsewhere"


PREFECT, MLFLOW = "prefect", "mlflow"
RUNS = PREFECT, "POST", "/api/flow_runs/filter"
FIND = MLFLOW, "POST", "/api/2.0/mlflow/experiments/search"
MAKE = MLFLOW, "POST", "/api/2.0/mlflow/experiments/create"
BATCH = MLFLOW, "POST", "/api/2.0/mlflow/runs/log-batch"
VERSION = MLFLOW, "POST", "/api/2.0/mlflow/model-versions/create"
FILES = "/api/2.0/mlflow-artifacts/artifacts"
DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
ASK = b'{"max_results": 5}'
NOBODY = [
    (None, 401),
    ((USER, "wrong"), 401),
    (("admin", "password"), 401),
    (("admin", "password1234"), 401),
    ((USER, ""), 401),
    ((USER, "p\u00e4ssword"), 401),
]
ME = "me"
"""Stands for the user and password."""


def place(where):
    return json.dumps({"name": f"at {where}", "artifact_location": where}).encode()


# Who asks what for what, with which body and headers, and the status that this has to have.
PROBES = [
    *((RUNS, who, b"{}", {}, code) for who, code in NOBODY),
    *((FIND, who, ASK, {}, code) for who, code in NOBODY),
    *(
        (each, None, None, {}, code)
        for each, code in [
            ((PREFECT, "GET", "/docs"), 404),
            ((PREFECT, "GET", "/redoc"), 404),
            ((PREFECT, "GET", "/openapi.json"), 404),
            ((PREFECT, "GET", "/api/docs"), 401),
            ((PREFECT, "GET", "/api/openapi.json"), 401),
            ((PREFECT, "GET", "/api/admin/settings"), 401),
            ((MLFLOW, "GET", "/"), 401),
            ((MLFLOW, "GET", "/signup"), 401),
            ((MLFLOW, "GET", "/metrics"), 401),
            ((MLFLOW, "GET", "/get-artifact?path=a&run_uuid=b"), 401),
            ((MLFLOW, "GET", f"{FILES}?path="), 401),
            ((MLFLOW, "PUT", f"{FILES}/1/a"), 401),
            ((MLFLOW, "GET", "/ajax-api/3.0/mlflow/assistant/config"), 401),
        ]
    ),
    ((MLFLOW, "POST", "/api/2.0/mlflow/users/create"), None, b"{}", {}, 401),
    *(
        (route, ME, body, {header: value}, 403)
        for route, body in ((RUNS, b"{}"), (FIND, ASK), ((MLFLOW, "GET", "/version"), None))
        for header, value in [
            ("Host", "evil.com"),
            ("Host", "10.0.0.1"),
            ("Host", "127.0.0.1.:{port}"),
            ("Origin", "http://evil.com"),
            ("Origin", "null"),
            ("Origin", "http://127.0.0.1:1"),
            ("Origin", "http://localhost.evil.com:{port}"),
        ]
    ),
    # What a browser asks before a page of another site may send more than a form could.
    *(
        ((server, "OPTIONS", path), None, None, {"Origin": "http://evil.com", **preflight}, 403)
        for preflight in [{"Access-Control-Request-Method": "POST"}]
        for server, _, path in (RUNS, FIND)
    ),
    (MAKE, ME, b'{"name": "forged"}', {"Content-Type": "text/plain"}, 400),
    ((PREFECT, "TRACE", RUNS[2]), ME, None, {}, 405),
    ((MLFLOW, "TRACE", FIND[2]), ME, None, {}, 405),
    *(
        (route, ME, body, {}, 400)
        for route in (RUNS, FIND, BATCH)
        for body in (DEEP, b"[" * 100_000, b"{", b"\xff\xfe", b'{"limit": NaN}')
    ),
    ((MLFLOW, "GET", FIND[2]), ME, DEEP, {}, 400),
    ((MLFLOW, "POST", "/graphql"), ME, DEEP, {}, 400),
    (RUNS, ME, b'{"offset": 99999999999999999999999}', {}, 400),
    ((PREFECT, "POST", "/api/flows/"), ME, b'{"name": "\\ud800"}', {}, 400),
    *((route, ME, body, {}, 400) for route in (FIND, BATCH) for body in (b'"x"', b"[1]", b"null")),
    *(
        (MAKE, ME, place(where), {}, 400)
        for where in [
            "file:///etc",
            "/etc",
            "../etc",
            "s3://mlflow-artifacts:/../etc",
            "http:///#/../../../etc",
            "http:///?/../../../etc",
            "mlflow-artifacts:/../../etc",
            "mlflow-artifacts:/%2e%2e/%2e%2e/etc",
            "mlflow-artifacts://evil.com/a",
        ]
    ),
    (MAKE, ME, b'{"name": "a", "artifactLocation": "file:///etc"}', {}, 400),
    *(
        (VERSION, ME, json.dumps({"name": "m", "source": where}).encode(), {}, 400)
        for where in ("file:///etc", "mlflow-artifacts:/../../etc", "http:///#/../../../etc")
    ),
    *(
        ((server, method, path), ME, body, {}, code)
        for server, method, path, body, code in [
            (PREFECT, "GET", "/..%2f..%2f..%2f..%2fetc%2fpasswd", None, 404),
            (PREFECT, "GET", "/api/static/..%2f..%2f..%2f..%2fetc/passwd", None, 404),
            (MLFLOW, "GET", "/static-files/..%2f..%2f..%2fetc%2fpasswd", None, 404),
            (MLFLOW, "GET", f"{FILES}?path=../../", None, 400),
            (MLFLOW, "GET", f"{FILES}/..%2f..%2f..%2fetc%2fpasswd", None, 400),
            (MLFLOW, "GET", f"{FILES}/%252e%252e/%252e%252e/etc/passwd", None, 400),
            (MLFLOW, "PUT", f"{FILES}/../../x", b"x", 400),
            (MLFLOW, "DELETE", f"{FILES}/../../x", None, 400),
            (MLFLOW, "GET", "/get-artifact?path=/etc/passwd&run_uuid=x", None, 400),
            (MLFLOW, "GET", "/api/2.0/mlflow/runs/get?run_id=x", None, 404),
        ]
    ),
    # What has to go on working: clients, and the pages at both names of this machine.
    (RUNS, ME, b"{}", {}, 200),
    (FIND, ME, ASK, {}, 200),
    *(
        ((server, method, path), who, body, {"Host": host, "Origin": f"http://{host}"}, 200)
        for host in ("127.0.0.1:{port}", "localhost:{port}")
        for (server, method, path), who, body in [
            ((PREFECT, "GET", "/"), None, None),
            ((PREFECT, "GET", "/ui-settings"), None, None),
            (RUNS, ME, b"{}"),
            ((MLFLOW, "GET", "/"), ME, None),
            (FIND, ME, ASK),
        ]
    ),
    # Prefect's page at localhost calls 127.0.0.1.
    (
        (PREFECT, "OPTIONS", RUNS[2]),
        None,
        None,
        {"Origin": "http://localhost:{port}", "Access-Control-Request-Method": "POST"},
        200,
    ),
    # An artifact may be any JSON.
    ((MLFLOW, "PUT", f"{FILES}/1/a.json"), ME, b"[NaN]", {}, 200),
    (MAKE, ME, place("mlflow-artifacts:/kept"), {}, 200),
]


def status(port, method, path, who=None, body=None, **headers):
    """The status of an answer; None where there is none."""
    sent = {"Content-Type": "application/json"} if body is not None else {}
    sent |= {name.replace("_", "-"): value.format(port=port) for name, value in headers.items()}
    if who:
        sent["Authorization"] = f"Basic {b64encode(':'.join(who).encode()).decode()}"
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, sent)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


@pytest.mark.slow
def test_without_the_password_nobody_gets_anything(tmp_path):
    port, mlflow_port = free_port(), free_port()
    command = [sys.executable, "-m", "flows.services", "server"]
    given = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
    }
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--mlflow-port", str(mlflow_port)],
            cwd=tmp_path,
            env=given,
            stdout=out,
            stderr=out,
        )
    ports = {PREFECT: port, MLFLOW: mlflow_port}
    try:
        until(lambda: status(port, "GET", "/api/health") is not None, 400, "Prefect answers")
        until(lambda: status(mlflow_port, "GET", "/health") is not None, 400, "MLflow answers")
        password = secret(tmp_path)
        made = MLFLOW, "POST", "/api/2.0/mlflow/registered-models/create"
        assert status(mlflow_port, *made[1:], (USER, password), b'{"name": "m"}') == 200
        wrong = []
        for (server, method, path), who, body, headers, code in PROBES:
            asks = (USER, password) if who == ME else who
            found = status(ports[server], method, path, asks, body, **headers)
            if found != code:
                text = body if body is None else body[:80]
                wrong.append((found, code, server, method, path, who, text, headers))
        assert not wrong, "\n".join(map(str, wrong))
    finally:
        process.terminate()
        process.wait(30)
    assert password not in (tmp_path / "out").read_text()
    # Pools, deployments and runs are this project's, and no other's of this user.
    assert (tmp_path / ".drawplate/prefect/prefect.db").exists()
    assert not (tmp_path / ".prefect").exists()
    # Both are gone with the command.
    time.sleep(1)
    for gone in (port, mlflow_port):
        assert status(gone, "GET", "/health") is None


def test_the_form_knows_every_stage_and_preset():
    from drawplate.settings import presets
    from stages import STAGES

    schema = form.Request.model_json_schema()["properties"]
    assert schema["targets"]["items"]["enum"] == list(STAGES)
    assert schema["presets"]["items"]["enum"] == sorted(presets())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"targets": ["pretrian"]}, "no stage 'pretrian' .did you mean 'pretrain'"),
        ({"presets": ["rl/dlr"]}, "did you mean 'rl/dler'"),
        ({"overrides": ["compress.ratio"]}, "is no key=value"),
        ({"overrides": ["compres.ratio=1"]}, "no key of params.yaml .did you mean 'compress.r"),
        ({"overrides": ["compress.method.name=slcie"]}, "no method 'slcie' .did you mean 'slice'"),
        ({"overrides": ["compress.method.name=[slice]"]}, r"no method \['slice'\]"),
        ({"overrides": ["prepare.tasks.x.name=gcd"]}, "no key of params.yaml"),
        ({"overrides": ["compress.ratio=[1"]}, "expected ',' or ']'"),
        ({"revision": "--output=x"}, "is no revision"),
        ({"revision": ""}, "at least 1 character"),
        ({"name": "a/b"}, "pattern"),
        ({"nothing": 1}, "not permitted"),
    ],
)
def test_the_form_refuses_what_is_wrong(wrong, said):
    with pytest.raises(ValidationError, match=said):
        form.Request(**wrong)
    # Whether a text is YAML, or an option of git, a schema cannot say.
    assert SCHEMA.is_valid(wrong) == (said in ("is no revision", "expected ',' or ']'"))


SCHEMA = Draft202012Validator(form.Request.model_json_schema())


def test_the_form_takes_what_is_right():
    right = form.Request(
        revision="main~2",
        targets=["compress"],
        overrides=[
            "prepare.tasks.0.max_terms=4",
            "compress.method.name=sparse",
            "compress.method.prune.name= 'wanda'",
            "compress.method={name: sparse}",
            "quantize.overrides.model.layers.0.*=8",
            "execution.threads=1",
        ],
        presets=["rl/grpo"],
        name="trial-1",
    )
    assert form.Request(**right.model_dump()) == right
    assert SCHEMA.is_valid(right.model_dump())


def test_the_form_takes_every_key_and_method_of_the_project_and_of_papers():
    from drawplate import settings

    def below(key, value):
        if isinstance(value, dict):
            return [one for name in value for one in below(f"{key}.{name}", value[name])]
        if isinstance(value, list):
            return [one for i, each in enumerate(value) for one in below(f"{key}.{i}", each)]
        return [f"{key}={json.dumps(value)}"]

    trees = {"params.yaml": settings.read(ROOT / "params.yaml"), **settings.presets()}
    for name, tree in trees.items():
        texts = [one for part in tree for one in below(part, tree[part]) if part != "paper"]
        assert texts
        assert SCHEMA.is_valid({"overrides": texts}), name
        form.Request(overrides=texts)


def test_the_form_lists_the_methods():
    text = form.Request.model_fields["overrides"].description
    assert "compress.method.name: low_rank, low_rank_sparse, shared, slice, sparse;" in text


def test_runs_that_are_asked_for_are_rehearsed_unless_the_form_says_no():
    assert form.Request().preflight
    assert not form.Request(preflight=False).preflight
    text = form.Request.model_fields["preflight"].description
    assert "false goes ahead without" in " ".join(text.split())
