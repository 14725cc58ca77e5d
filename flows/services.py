"""`make server`, `make worker POOL=gpu`, `make deploy`: Prefect and MLflow, closed by default.

Both servers listen on 127.0.0.1 only and ask for a password, a random one in `.drawplate/secret`
that only its owner can read. Workers and `deploy` on this machine find it there; elsewhere
`PREFECT_API_URL`, `PREFECT_API_AUTH_STRING` and MLflow's own variables say where and as whom.
What Prefect keeps lies in `.drawplate/prefect`, so that projects share no pool and no deployment.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import click

from drawplate.core.errors import UserError
from flows.guard import hosts, pages
from stages.quiet import INTERRUPTED, guarded, interruptible, quiet_environment

USER = "drawplate"
HOST = "127.0.0.1"
SERVER = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Slots that are held must still be held after a restart.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
    "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "flows.ordering",
    # SQLite takes one writer at a time; a busy machine makes the others wait.
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
    "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
}
"""Settings of Prefect's server besides where it listens and whom it lets in."""
SERVE = [sys.executable, "-m", "flows.server", "server", "start"]
"""Begins the command of Prefect's server."""
CHECKOUT = "DRAWPLATE_CHECKOUT"
"""Where prefect.yaml has a run look for the flows: a folder of each worker's own."""
SERVE_MLFLOW = [sys.executable, "-m", "flows.mlflow_server", "server"]
"""Begins the command of MLflow's."""
LOST = 90
"""Seconds without a sign of life after which a flow run counts as lost."""


def secret(root: Path) -> str:
    """The password of this project's servers, made when it is asked for first."""
    file = root / ".drawplate" / "secret"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if file.stat().st_mode & 0o077:
            raise UserError(f"{file} can be read by others; chmod 600 it, or remove it") from None
        return file.read_text().strip()
    with os.fdopen(handle, "w") as out:
        out.write(f"{secrets.token_hex(24)}\n")
    return file.read_text().strip()


def home(root: Path) -> str:
    """Where Prefect keeps its database and leases; else a user's projects would share them."""
    return os.environ.get("PREFECT_HOME") or str(root / ".drawplate" / "prefect")


def environment(root: Path, port: int = 4200, mlflow_port: int = 5000) -> dict[str, str]:
    """For clients of the two servers; what is set already, stays."""
    quiet_environment()
    found = {**os.environ, "PREFECT_HOME": home(root)}
    if "PREFECT_API_URL" not in found:
        found["PREFECT_API_URL"] = f"http://{HOST}:{port}/api"
        found["PREFECT_API_AUTH_STRING"] = f"{USER}:{secret(root)}"
    if "MLFLOW_TRACKING_URI" not in found:
        found["MLFLOW_TRACKING_URI"] = f"http://{HOST}:{mlflow_port}"
        found["MLFLOW_TRACKING_USERNAME"] = USER
        found["MLFLOW_TRACKING_PASSWORD"] = secret(root)
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found.get('PATH', '')}"
    found.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    found.setdefault("PREFECT_WORKER_QUERY_SECONDS", "3")
    return found


def servers(root: Path, port: int, mlflow_port: int) -> list[tuple[list[str], dict[str, str]]]:
    """Commands and environments of Prefect's server and MLflow's."""
    quiet_environment()
    folder = root / ".drawplate"
    password = secret(root)
    auth = folder / "mlflow-auth.ini"
    text = "\n".join(
        [
            "[mlflow]",
            "default_permission = NO_PERMISSIONS",
            f"database_uri = sqlite:///{folder / 'mlflow-auth.db'}",
            f"admin_username = {USER}",
            f"admin_password = {password}",
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
        ]
    )
    with os.fdopen(os.open(auth, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(f"{text}\n")
    # Whoever puts a proxy before them sets these, and `PREFECT_UI_API_URL`, to its address.
    given = {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": pages(port),
        "PREFECT_UI_API_URL": f"http://{HOST}:{port}/api",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": pages(mlflow_port),
        **os.environ,
    }
    prefect = {
        **SERVER,
        "PREFECT_HOME": home(root),
        "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{password}",
        # The server's own services and its page call it as any client does.
        "PREFECT_API_AUTH_STRING": f"{USER}:{password}",
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
    }
    mlflow = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(hosts(given["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"])),
        "MLFLOW_AUTH_CONFIG_PATH": str(auth),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(24),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    store = os.environ.get("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{root / 'mlflow.db'}")
    return [
        (
            [*SERVE, "--host", HOST, "--port", str(port)],
            {**given, **prefect},
        ),
        (
            [
                *[*SERVE_MLFLOW, "--host", HOST, "--port", str(mlflow_port)],
                *["--app-name", "basic-auth", "--workers", "1", "--backend-store-uri", store],
                *["--artifacts-destination", str(root / "mlartifacts")],
            ],
            {**given, **mlflow},
        ),
    ]


def run_together(commands: Sequence[tuple[list[str], Mapping[str, str]]]) -> int:
    """Runs processes until one ends or this one is told to; then all of them end."""
    interruptible()
    running = [
        subprocess.Popen(command, env=dict(given), start_new_session=True)
        for command, given in commands
    ]
    try:
        while all(process.poll() is None for process in running):
            time.sleep(0.5)
        return max(abs(process.poll() or 0) for process in running)  # negative for a signal
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        for sign, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            for process in running:
                try:
                    os.killpg(process.pid, sign)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and any(p.poll() is None for p in running):
                time.sleep(0.1)


@click.group()
def services() -> None:
    """Prefect's server and workers, and MLflow's server, for this project."""


@services.command()
@click.option("--port", default=4200, show_default=True)
@click.option("--mlflow-port", default=5000, show_default=True)
def server(port: int, mlflow_port: int) -> None:
    """Start Prefect and MLflow on 127.0.0.1; Ctrl-C ends both."""
    root = Path.cwd()
    commands = servers(root, port, mlflow_port)
    click.echo(f"Prefect  http://{HOST}:{port}\nMLflow   http://{HOST}:{mlflow_port}")
    click.echo(f"user {USER}, password in {root / '.drawplate' / 'secret'}")
    sys.exit(run_together(commands))


@services.command()
@click.argument("pool", type=click.Choice(["cpu", "gpu"]))
@click.option("--gpu", "index", default=0, show_default=True, help="Which GPU; one worker each.")
@click.option("--name", help="Name of the worker; host and pool where it is not given.")
def worker(pool: str, index: int, name: str | None) -> None:
    """Take runs from a work pool until Ctrl-C; runs under way save and end."""
    given = environment(Path.cwd())
    given[CHECKOUT] = str(Path(__file__).parents[1])
    host = socket.gethostname()
    if pool == "gpu":
        given["DRAWPLATE_GPU"] = f"gpu@{host}:{index}"
        if shutil.which("nvidia-smi"):
            given["CUDA_VISIBLE_DEVICES"] = str(index)
            given["DRAWPLATE_DEVICE"] = "cuda"
    # A shell that started this in the background had it ignore SIGINT, and a Prefect worker that
    # is told to end sends itself one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prefect = str(Path(sys.executable).parent / "prefect")
    label = name or f"{host}-{pool}{index if pool == 'gpu' else ''}"
    command = [prefect, "worker", "start", "--pool", pool, "--type", "process", "--name", label]
    # A second run would wait here for this GPU, also where another GPU is free.
    os.execve(prefect, [*command, *(["--limit", "1"] if pool == "gpu" else [])], given)


@services.command()
@click.option("--slots", default=2, show_default=True, help="Stages at a time in pool cpu.")
def deploy(slots: int) -> None:
    """Tell the server about pools, deployments, and what to do when a run is lost."""
    os.environ.update(environment(Path.cwd()))
    # Prefect would write its value here into the deployments, for every worker.
    os.environ.pop(CHECKOUT, None)
    _wait_for(f"{os.environ['PREFECT_API_URL']}/health")
    make_pools(slots)
    make_automations()
    command = [str(Path(sys.executable).parent / "prefect"), "--no-prompt", "deploy", "--all"]
    sys.exit(subprocess.run(command, check=False).returncode)


def _wait_for(url: str, patience: float = 300) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, TimeoutError, ConnectionError) as error:
            if getattr(error, "code", None) is not None:  # it answers, whatever it says
                return
            if time.monotonic() > deadline:
                raise UserError(f"no server at {url}; start one with `make server`") from None
            time.sleep(1)


def make_pools(slots: int) -> None:
    """The pools `cpu` and `gpu`, and in `cpu` one queue for pipelines and one for stages.

    A pipeline waits for its stages: if both took the same slots, pipelines could fill them all.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    with get_client(sync_client=True) as client:
        for pool in ("cpu", "gpu"):
            template = ProcessWorker.get_default_base_job_template()
            try:
                client.create_work_pool(
                    WorkPoolCreate(name=pool, type="process", base_job_template=template)
                )
            except ObjectAlreadyExists:
                continue
        for queue, limit in (("pipelines", 20), ("stages", slots)):
            try:
                client.create_work_queue(queue, concurrency_limit=limit, work_pool_name="cpu")
            except ObjectAlreadyExists:
                known = client.read_work_queue_by_name(queue, work_pool_name="cpu")
                client.update_work_queue(known.id, concurrency_limit=limit)


def make_automations() -> None:
    """A run without a sign of life is crashed; a crashed pipeline is started again.

    A crashed stage is started again by its pipeline, which knows how often that was tried.
    """
    from prefect.automations import AutomationCore
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    run = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
    ends = [f"prefect.flow-run.{end}" for end in ("Completed", "Failed", "Cancelled", "Crashed")]
    wanted = [
        AutomationCore(
            name="drawplate: a lost run is crashed",
            trigger=EventTrigger(
                match=run,
                for_each={"prefect.resource.id"},
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *ends},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=LOST),
            ),
            actions=[
                ChangeFlowRunState(state=StateType.CRASHED, message=f"no sign of life for {LOST} s")
            ],
        ),
        AutomationCore(
            name="drawplate: a crashed pipeline starts again",
            trigger=EventTrigger(
                match=run,
                match_related=ResourceSpecification(
                    {"prefect.resource.role": "flow", "prefect.resource.name": "pipeline"}
                ),
                for_each={"prefect.resource.id"},
                expect={"prefect.flow-run.Crashed"},
                posture=Posture.Reactive,
                threshold=1,
                within=timedelta(seconds=0),
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED,
                    name="AwaitingRetry",
                    message="its worker was lost; it goes on with what is done",
                )
            ],
        ),
    ]
    with get_client(sync_client=True) as client:
        for automation in wanted:
            for known in client.read_automations_by_name(automation.name):
                client.delete_automation(known.id)
            client.create_automation(automation)


if __name__ == "__main__":
    sys.exit(guarded(lambda: services.main(standalone_mode=False)))
