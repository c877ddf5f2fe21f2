"""A real gateway in a process of its own, and the raw wire protocol of a run on it."""

import os
import signal
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

import stores

REPO = Path(__file__).parents[1]
KEY = "slk-the-key-of-these-tests"
MODEL = "tiny/llama"
EXPERTS = "tiny/experts"
# Of the tiny model that is served.
MAX_POSITIONS = 256
Json = dict[str, Any]
T = TypeVar("T")


def environment(**extra: str) -> dict[str, str]:
    """Our environment with the package importable, and without anything that points at another server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SELFLOOP_", "LOOPS_", "BASETEN_", "HF_"))}
    path = os.pathsep.join([str(REPO / "src"), *filter(None, [kept.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "SELFLOOP_HUB_URL": "off"}
    return kept | own | extra


def selfloop(*arguments: str, timeout: float = 120) -> str:
    """Run a command of the CLI to its end; returns its stdout."""
    env = environment()
    if "--data-dir" in arguments:
        env |= stores.environment(Path(arguments[arguments.index("--data-dir") + 1]))
    command = [sys.executable, "-m", "selfloop.cli.main", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def until(condition: Callable[[], T], what: str, timeout: float = 60) -> T:
    """Poll until ``condition`` holds; returns its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.02)
    return value


class Gateway:
    """``selfloop serve`` on a data directory; may be killed and started again on the same port."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.port = stores.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = data_dir.with_name(data_dir.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[httpx.Client] = []
        self.trusted: ssl.SSLContext | bool = True
        """Whom its clients take certificates from."""

    def start(self, key: str | None = KEY, *options: str, **variables: str) -> "Gateway":
        given = variables if key is None else {"SELFLOOP_API_KEY": key} | variables
        arguments = [
            "serve",
            "--port",
            str(self.port),
            "--data-dir",
            str(self.data_dir),
            "--dtype",
            "float32",
            "--no-prepare",
            *options,
        ]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "selfloop.cli.main", *arguments],
                env=environment(**given, **stores.environment(self.data_dir)),
                stdout=log,
                stderr=log,
            )
        until(self._is_healthy, "the gateway answers /healthz")
        return self

    def _is_healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the gateway exited with {self.process.returncode}:\n{self.log}"
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5, verify=self.trusted).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        workers = sorted((self.data_dir / "logs").glob("*.log"))
        return "\n".join(path.read_text(errors="replace") for path in [self.log_path, *workers])

    def http(self, key: str | None = KEY) -> httpx.Client:
        """A client that sends ``key``; closed with the gateway."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=60, verify=self.trusted)
        self._clients.append(client)
        return client

    def worker_pids(self) -> list[int]:
        return [worker.pid for host in self.hosts() for worker in _children(host) if not is_gone(worker.pid)]

    def hosts(self) -> list[psutil.Process]:
        """The processes that have a base model in memory, also those that the gateway before left."""
        record = f'"record":"{self.data_dir}/workers/'
        # Their workers are forked from them, and have the same command line.
        return [p for p in psutil.process_iter() if any(record in part for part in _host_arguments(p))]

    def worker_pid(self) -> int:
        (pid,) = until(self.worker_pids, "there is a worker")
        return pid

    def kill_worker(self) -> int:
        pid = self.worker_pid()
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill(self) -> None:
        """``kill -9``; the workers end, and the base models wait in memory for the next start."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout: float = 30) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self.process is not None and self.process.poll() is not None:
            # Nobody comes to take them over.
            for host in self.hosts():
                host.kill()
        elif self.process is not None:
            workers = self.worker_pids()
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            for pid in workers:
                until(lambda pid=pid: is_gone(pid), f"worker {pid} has ended", 20)


def _host_arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.name() != "selfloop-worker" else []
    except psutil.Error:
        return []


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def copy_data(template: Path, target: Path) -> Path:
    return stores.copy(template, target)


class Refused(Exception):
    """The answer was not the expected one."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"{response.request.method} {response.request.url}: {response.status_code} {response.text}")
        self.response = response


def ok(response: httpx.Response, status: int = 200) -> Any:
    """The JSON of an answer that must have ``status``."""
    if response.status_code != status:
        raise Refused(response)
    return response.json()


def new_session(http: httpx.Client) -> str:
    return ok(http.post("/v1/loops/sessions", json={}))["session"]["id"]


def create_run(http: httpx.Client, session_id: str | None = None, **fields: object) -> Json:
    """The ``run`` of a POST /v1/loops/runs."""
    body = {"session_id": session_id or new_session(http), "base_model": MODEL, "lora_rank": 8} | fields
    return ok(http.post("/v1/loops/runs", json={k: v for k, v in body.items() if v is not ...}))["run"]


def tensor(values: list[Any], dtype: str = "float32") -> Json:
    return {"data": values, "dtype": dtype, "shape": [len(values)]}


def datum(tokens: list[int], targets: list[int] | None = None, **inputs: list[Any]) -> Json:
    """One example on the wire; without ``targets`` each position predicts the next token."""
    if targets is None:
        tokens, targets = tokens[:-1], tokens[1:]
    extra = {name: tensor(values) for name, values in inputs.items()}
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "loss_fn_inputs": {"target_tokens": tensor(targets, "int64")} | extra,
    }


def words(seed: int, length: int = 12) -> list[int]:
    """Token ids that differ with ``seed``."""
    return [3 + (seed * 37 + i * i * 11 + i * 5) % 250 for i in range(length)]


class Run:
    """The data plane of one run, as the official client speaks it."""

    def __init__(self, http: httpx.Client, resource: Json) -> None:
        self.http = http
        self.resource = resource
        self.id: str = resource["id"]
        self.model: str = resource["base_model"]
        self.path = f"/loops/runs/{self.id}"
        self.seq = 0

    @classmethod
    def create(cls, http: httpx.Client, session_id: str | None = None, **fields: object) -> "Run":
        return cls(http, create_run(http, session_id, **fields))

    def attached(self) -> "Run":
        """With the ``init_trainer_server`` that every official client starts with."""
        self.do("init_trainer_server", lora_rank=self.resource["lora_rank"], base_model=self.model)
        return self

    def post(self, op: str, *, key: str | None = None, seq: int | None = None, **body: object) -> httpx.Response:
        if seq is None:
            seq = self.seq = self.seq + 1
        content = {"model": self.model, "run_id": self.id, "seq_id": seq} | body
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self.http.post(f"{self.path}/{op}", json=content, headers=headers)

    def submit(self, op: str, **body: Any) -> str:
        """Accepted and on its way; returns the operation's id."""
        return ok(self.post(op, **body), 202)["operation_id"]

    def outcome(self, operation_id: str, timeout: float = 60) -> Json:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            response = self.http.get(f"{self.path}/operations/{operation_id}")
            if response.status_code != 408:
                return ok(response)
        raise AssertionError(f"operation {operation_id} has no outcome after {timeout} s: {response.text}")

    def result(self, operation_id: str, timeout: float = 60) -> Json:
        outcome = self.outcome(operation_id, timeout)
        assert outcome["status"] == "done", outcome
        return outcome["result"]

    def do(self, op: str, **body: Any) -> Json:
        return self.result(self.submit(op, **body))

    def forward(self, data: list[Json], **body: Any) -> Json:
        return self.do("forward", data=data, loss_fn="cross_entropy", **body)

    def forward_backward(self, data: list[Json], **body: Any) -> Json:
        return self.do("forward_backward", data=data, loss_fn="cross_entropy", **body)

    def step(self, learning_rate: float = 1e-2) -> Json:
        return self.do("optim_step", adam_params={"learning_rate": learning_rate})

    def train(self, *seeds: int) -> None:
        """One step a seed."""
        for seed in seeds:
            self.forward_backward([datum(words(seed))])
            self.step()

    def logprobs(self, tokens: list[int] | None = None) -> list[float]:
        result = self.forward([datum(tokens or words(99))])
        return result["loss_fn_outputs"][0]["logprobs"]["data"]

    def policy_version(self) -> int:
        return ok(self.http.get(f"{self.path}/policy_version"))["policy_version"]

    def save(self, name: str, kind: str = "save_state") -> str:
        """Save under a name; returns the checkpoint's ``bt://`` path."""
        return self.do(kind, name=name)["path"]

    def files(self, path: str) -> dict[str, bytes]:
        """A checkpoint's files by name, through the links of the management API."""
        (checkpoint,) = ok(self.http.get("/v1/loops/checkpoints", params={"checkpoint_path": path}))["checkpoints"]
        listed = ok(self.http.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files"))["presigned_urls"]
        return {f["relative_file_name"]: httpx.get(f["url"]).raise_for_status().content for f in listed}

    def state(self, name: str = "look") -> dict[str, bytes]:
        """The run's tensors (adapter and moments), bit for bit."""
        files = self.files(self.save(name))
        return {name: content for name, content in files.items() if name.endswith(".safetensors")}
