"""A small DVC project, and the real Prefect server and workers to run it on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from flows.graph import inputs
from flows.guard import pages
from flows.handover import entries, hand_on
from flows.services import SERVE, SERVER
from flows.stage import StageRequest, bring_up_to_date
from flows.workspace import workspace

ROOT = Path(__file__).parents[1]

# prepare feeds pretrain (gpu) and quantize (cpu), which do not need each other; compress (gpu)
# needs pretrain. finetune (gpu) needs nothing, so that what happens to one run can be tried alone.
YAML = """
stages:
  prepare:
    cmd: python work.py prepare
    deps: [work.py]
    params: [prepare.seed]
    outs: [corpus.txt]
    meta: {pool: cpu}
  pretrain:
    cmd: python work.py pretrain corpus.txt
    deps: [work.py, corpus.txt]
    params: [pretrain.seed, pretrain.training.steps]
    outs: [base.txt]
    metrics: [pretrain.json: {cache: false}]
    meta: {pool: gpu}
  compress:
    cmd: python work.py compress base.txt
    deps: [work.py, base.txt]
    params: [compress.ratio]
    outs: [compressed.txt]
    meta: {pool: gpu}
  quantize:
    cmd: python work.py quantize corpus.txt
    deps: [work.py, corpus.txt]
    params: [quantize.bits]
    outs: [quantized.txt]
    meta: {pool: cpu}
  finetune:
    cmd: python work.py finetune
    deps: [work.py]
    params: [finetune.seed, finetune.steps]
    outs: [tuned.txt]
    meta: {pool: gpu}
"""

# A stage that trains: it saves each step where a later attempt finds it, says how far it is, saves
# and leaves when it is told to, and ends when `dvc` does; what it saves is one process' at a time,
# as a real stage's. `log` tells who computed what, and when.
WORK = r"""
import ctypes, fcntl, json, os, signal, sys, time
from pathlib import Path
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
stop = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stop.append(1))
from ruamel.yaml import YAML
stage, inputs = sys.argv[1], [Path(name).read_text() for name in sys.argv[2:]]
tree = YAML(typ="safe").load(Path("params.yaml").read_text())
steps = {"pretrain": tree["pretrain"]["training"]["steps"],
         "finetune": tree["finetune"]["steps"]}.get(stage, 3)
value = {"prepare": tree["prepare"].get("seed"), "pretrain": tree["pretrain"].get("seed"),
         "compress": tree["compress"].get("ratio"), "quantize": tree["quantize"].get("bits"),
         "finetune": tree["finetune"].get("seed")}[stage]
def log(what):
    with open(os.environ["TOY_LOG"], "a") as file:
        fact = dict(what=what, stage=stage, value=value, time=time.time(), pid=os.getpid(),
                    worker=os.environ.get("TOY_WORKER"), folder=os.getcwd(),
                    gpu=os.environ.get("DRAWPLATE_GPU"))
        file.write(json.dumps(fact) + "\n")
if value == 13:
    raise SystemExit("drawplate: thirteen is no good seed")
state = Path(os.environ.get("DRAWPLATE_STATE", ".")) / f"{stage}-{value}-{steps}.json"
state.parent.mkdir(parents=True, exist_ok=True)
lock = state.with_suffix(".lock").open("a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    raise SystemExit(f"drawplate: {state} is being made by process of another run")
numbers = json.loads(state.read_text()) if state.exists() else []
log(f"start at {len(numbers)}")
while len(numbers) < steps:
    time.sleep(0.2)
    numbers.append((len(numbers) * 7919 + int(float(value) * 100)) % 1000)
    state.with_suffix(".new").write_text(json.dumps(numbers))
    state.with_suffix(".new").replace(state)
    print(f"[{stage}] train {len(numbers)}/{steps}", flush=True)
    if stop:
        log(f"stopped at {len(numbers)}")
        sys.exit(130)
out = {"prepare": "corpus", "pretrain": "base", "compress": "compressed", "quantize": "quantized",
       "finetune": "tuned"}
Path(out[stage] + ".txt").write_text(repr((value, numbers, inputs)))
if stage == "pretrain":
    Path("pretrain.json").write_text(json.dumps({"loss": numbers[-1]}))
state.unlink()
log("end")
"""


def git(project, *arguments, given=None, env=None):
    done = subprocess.run(
        ["git", *arguments], cwd=project, check=True, capture_output=True, input=given, env=env
    )
    return done.stdout.decode().strip()


def make_project(folder, remote=True):
    """The project, committed, with `remote/` beside it as DVC's remote."""
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.name", "a")
    git(folder, "config", "user.email", "a@localhost")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    if remote:
        (folder.parent / "remote").mkdir(exist_ok=True)
        (folder / ".dvc/config").write_text(
            "[core]\n    analytics = false\n    remote = store\n"
            "['remote \"store\"']\n    url = ../../remote\n"
        )
    (folder / "dvc.yaml").write_text(YAML)
    (folder / "work.py").write_text(WORK)
    (folder / ".gitignore").write_text("/*.txt\n")
    params = (ROOT / "params.yaml").read_text()
    for old, new in (
        ("steps: 2200", "steps: 3"),
        ("\n  steps: 84\n", "\n  steps: 3\n  seed: 0\n"),
    ):
        assert params.count(old) == 1
        params = params.replace(old, new)
    (folder / "params.yaml").write_text(params)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def run_in(project, ref, *stages):
    """What a worker does, without Prefect."""
    for stage in stages:
        with workspace(str(project), ref) as place:
            request = StageRequest(stage=stage, ref=ref)
            status = bring_up_to_date(place, request, inputs(place.root, stage), print)
            hand_on(place, ref, stage, entries(place)[stage])
    return status


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def until(condition, seconds=900, what=""):
    """Waits for `condition` to be true, and returns what it gave."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.5)


class Farm:
    """A project, a server and workers, all in one folder and on 127.0.0.1."""

    def __init__(self, folder, remote=True):
        self.folder = folder
        self.project = make_project(folder / "project", remote)
        self.port = free_port()
        self.log = folder / "log"
        self.log.touch()
        self.processes = {}
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_API_AUTH_STRING": "drawplate:test",
            "PREFECT_SERVER_API_AUTH_STRING": "drawplate:test",
            **SERVER,
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": pages(self.port),
            "PREFECT_UI_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "true",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
            "DRAWPLATE_SOURCE": str(self.project),
            "DRAWPLATE_WORKSPACES": str(folder / "workspaces"),
            "DRAWPLATE_STATE": str(folder / "state"),
            "TOY_LOG": str(self.log),
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self, name, *command, **more):
        out = (self.folder / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.environment, "TOY_WORKER": name, **more},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self.processes[name]

    def server(self):
        self.start("server", *SERVE, "--host", "127.0.0.1", "--port", str(self.port))
        until(self._answers, 400, "the server answers")

    def _answers(self):
        from urllib.error import URLError
        from urllib.request import urlopen

        try:
            with urlopen(f"http://127.0.0.1:{self.port}/api/health", timeout=2):
                return True
        except (URLError, TimeoutError, ConnectionError) as error:
            return getattr(error, "code", None) is not None

    def deploy(self, slots=2, checkout=ROOT):
        done = subprocess.run(
            [sys.executable, "-m", "flows.services", "deploy", "--slots", str(slots)],
            cwd=checkout,
            env={**self.environment, "PYTHONPATH": f"{checkout}:{checkout / 'src'}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def worker(self, name, pool, gpu=0, **more):
        """A worker with a DVC cache of its own, as on another machine."""
        command = [sys.executable, "-m", "flows.services", "worker", pool, "--name", name]
        command += ["--gpu", str(gpu)]
        more = {"DRAWPLATE_CACHE": str(self.folder / f"cache-{name}"), **more}
        self.start(name, *command, **more)

    def kill(self, name):
        """SIGKILL for one process, and nothing for those it started."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self):
        for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
            for process in self.processes.values():
                try:
                    os.killpg(process.pid, sign)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and any(
                process.poll() is None for process in self.processes.values()
            ):
                time.sleep(0.1)

    def facts(self, what="start"):
        """What the stages said they did."""
        rows = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [row for row in rows if row["what"].startswith(what)]

    @contextmanager
    def client(self):
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        changes = {
            PREFECT_API_URL: self.environment["PREFECT_API_URL"],
            PREFECT_API_AUTH_STRING: self.environment["PREFECT_API_AUTH_STRING"],
        }
        with temporary_settings(changes), get_client(sync_client=True) as client:
            yield client

    def ask(self, deployment="pipeline/on-demand", **request):
        """Asks for a run and returns its id; rehearsed first only where the request says so."""
        request = {"preflight": False, **request}
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            parameters = {"request": request}
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def branch(self, name, **seeds):
        """A branch with other parameters, such as `pretrain_steps=50` and `quantize_bits=3`."""
        from drawplate import settings

        tree = settings.read(self.project / "params.yaml")
        for key, value in seeds.items():
            stage, _, field = key.partition("_")
            where = tree[stage]
            if field == "steps":
                where = where.get("training", where)
            where[field] = value
        text = json.dumps(tree)  # JSON is YAML
        blob = git(self.project, "hash-object", "-w", "--stdin", given=text.encode())
        index = {**os.environ, "GIT_INDEX_FILE": str(self.folder / f"index-{name}")}
        git(self.project, "read-tree", "main", env=index)
        entry = f"100644,{blob},params.yaml"
        git(self.project, "update-index", "--cacheinfo", entry, env=index)
        made = git(self.project, "write-tree", env=index)
        commit = git(self.project, "commit-tree", made, "-p", "main", "-m", name)
        git(self.project, "update-ref", f"refs/heads/{name}", commit)
        return name

    def state(self, run):
        with self.client() as client:
            return client.read_flow_run(run).state

    def wait(self, run, seconds=900):
        """The final state of a run."""
        return until(
            lambda: (s := self.state(run)) and s.is_final() and s, seconds, f"run {run} ends"
        )

    def children(self, name=None, flow="stage"):
        """Runs of a flow, oldest first."""
        from prefect.client.schemas.filters import FlowFilter, FlowFilterName

        with self.client() as client:
            runs = client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])), limit=200
            )
        runs.sort(key=lambda run: run.created)
        return [run for run in runs if name in (None, run.name)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
