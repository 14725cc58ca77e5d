"""The servers are closed by default, and their password stays with its owner (row 22)."""

import json
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from pydantic import ValidationError
from workers_cases import ROOT, free_port, until

from drawplate.core.errors import UserError
from flows import request as form
from flows.services import USER, secret, servers


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


def status(url, user=None, password=None, body=None):
    request = Request(url, data=body, headers={"Content-Type": "application/json"})
    if user:
        token = b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    try:
        with urlopen(request, timeout=10) as answer:
            return answer.status
    except HTTPError as error:
        return error.code
    except (URLError, ConnectionError, TimeoutError):
        return None


@pytest.mark.slow
def test_without_the_password_nobody_gets_anything(tmp_path):
    port, mlflow_port = free_port(), free_port()
    command = [sys.executable, "-m", "flows.services", "server"]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
    }
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--mlflow-port", str(mlflow_port)],
            cwd=tmp_path,
            env=environment,
            stdout=out,
            stderr=out,
        )
    prefect, mlflow = f"http://127.0.0.1:{port}/api", f"http://127.0.0.1:{mlflow_port}"
    runs, find = f"{prefect}/flow_runs/filter", f"{mlflow}/api/2.0/mlflow/experiments/search"
    ask = json.dumps({"max_results": 5}).encode()
    try:
        until(lambda: status(f"{prefect}/health") is not None, 400, "Prefect answers")
        until(lambda: status(find, body=ask) is not None, 400, "MLflow answers")
        password = secret(tmp_path)
        for name, word in (
            (None, None),
            (USER, "wrong"),
            ("admin", "password"),
            ("admin", "password1234"),
            (USER, ""),
        ):
            assert status(runs, name, word, b"{}") == 401
            assert status(find, name, word, ask) == 401
        assert status(runs, USER, password, b"{}") == 200
        assert status(find, USER, password, ask) == 200
    finally:
        process.terminate()
        process.wait(30)
    assert password not in (tmp_path / "out").read_text()
    # Both are gone with the command.
    time.sleep(1)
    assert status(f"{prefect}/health") is None
    assert status(find, body=ask) is None


def test_the_form_knows_every_stage_and_preset():
    from drawplate.settings import presets
    from stages.run import names

    schema = form.Request.model_json_schema()["properties"]
    assert schema["targets"]["items"]["enum"] == list(names())
    assert schema["presets"]["items"]["enum"] == sorted(presets())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"targets": ["pretrian"]}, "no stage 'pretrian' .did you mean 'pretrain'"),
        ({"presets": ["rl/dlr"]}, "did you mean 'rl/dler'"),
        ({"overrides": ["compress.ratio"]}, "pattern"),
        ({"overrides": ["compres.ratio=1"]}, "pattern"),
        ({"overrides": ["compress.ratio=[1"]}, "compress.ratio"),
        ({"revision": "--output=x"}, "is no revision"),
        ({"revision": ""}, "at least 1 character"),
        ({"name": "a/b"}, "pattern"),
        ({"nothing": 1}, "not permitted"),
    ],
)
def test_the_form_refuses_what_is_wrong(wrong, said):
    with pytest.raises(ValidationError, match=said):
        form.Request(**wrong)


def test_the_form_takes_what_is_right():
    right = form.Request(
        revision="main~2",
        targets=["compress"],
        overrides=["prepare.tasks.0.max_terms=4", "compress.method.name=sparse"],
        presets=["rl/grpo"],
        name="trial-1",
    )
    assert form.Request(**right.model_dump()) == right
