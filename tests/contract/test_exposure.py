"""What a server lets out: nothing that is secret, to nobody in clear text, to no other user of the machine.

One server that speaks HTTPS, exports its spans, and was given secrets that stand nowhere else. A session goes through
all the places where they are sent; then everything that the server has written or said is searched for them.
"""

import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pyrage
import pytest
import trustme
from test_tinker import Wire

import stores
from gateway import MODEL, Gateway, Run, copy_data, datum, environment, ok, until, words

KEY = "slk-environment-5ecre7-ENVIRONMENT"
SECRETS = {
    "hub token": "hf_5ecre7HUBTOKEN",
    "headers of the collector": "5ecre7COLLECTOR",
    "a key that is none": "slk-5ecre7WRONGKEY",
    "a signature that is none": "5ecre75ecre75ecre7",
    "a password in a URL": "5ecre7PASSWORD",
    "a cookie": "5ecre7COOKIE",
}
SIGNATURE = "X-Amz-Signature" if stores.ON_SERVERS else "signature"
"""The name of a link's; the bucket makes its own."""


class Collector:
    """Takes spans over OTLP and keeps every byte."""

    def __init__(self) -> None:
        received: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.received = received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    issued = authority.issue_cert("127.0.0.1", "localhost")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for place, part in enumerate(issued.cert_chain_pems):
        part.write_to_path(folder / "chain.pem", append=place > 0)
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(folder / "another_key.pem")
    return folder


@pytest.fixture(scope="module")
def exposed(
    data_template: Path, certificates: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    data_dir = copy_data(data_template, tmp_path_factory.mktemp("exposed") / "data")
    data_dir.chmod(0o700)
    own = Gateway(data_dir)
    own.url = f"https://127.0.0.1:{own.port}"
    own.trusted = ssl.create_default_context(cafile=str(certificates / "authority.pem"))
    own.start(
        KEY,
        "--tls-cert",
        str(certificates / "chain.pem"),
        "--tls-key",
        str(certificates / "key.pem"),
        HF_TOKEN=SECRETS["hub token"],
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.url}/v1/traces",
        OTEL_EXPORTER_OTLP_HEADERS=f"authorization={SECRETS['headers of the collector']}",
        OTEL_BSP_SCHEDULE_DELAY="200",
    )
    yield own
    own.close()


@pytest.mark.clients
def test_the_official_client_over_https(exposed: Gateway, certificates: Path, client_python: str, tmp_path: Path):
    script = f"""
from baseten.loops import AdamParams, Datum, ModelInput, ServiceClient, TensorData
trainer = ServiceClient().create_lora_training_client(base_model={MODEL!r}, rank=4)
inputs = {{"target_tokens": TensorData.from_list([4, 5, 6], dtype="int64")}}
datum = Datum(model_input=ModelInput.from_ints([3, 4, 5]), loss_fn_inputs=inputs)
trainer.forward_backward([datum], loss_fn="cross_entropy").result()
print("step", trainer.optim_step(AdamParams(learning_rate=1e-3)).result().metrics["step"])
"""
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {"LOOPS_BASE_URL": exposed.url, "BASETEN_API_KEY": KEY, "WANDB_MODE": "disabled"}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        command = [client_python, "-c", script]
        return subprocess.run(command, env=env | more, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run(SSL_CERT_FILE=str(certificates / "authority.pem"))
    assert "step 1" in done.stdout, done.stderr + exposed.log
    distrusting = run()
    assert distrusting.returncode != 0
    assert "CERTIFICATE_VERIFY_FAILED" in distrusting.stderr


def test_plain_http_gets_no_answer(exposed: Gateway):
    with pytest.raises(httpx.TransportError):
        httpx.get(exposed.url.replace("https:", "http:") + "/healthz")


@pytest.mark.parametrize(
    ("cert", "key", "says"),
    [
        ("chain.pem", "another_key.pem", "PEM certificate chain"),
        ("chain.pem", None, "both, or neither"),
        ("no.pem", "key.pem", "PEM certificate chain"),
        ("key.pem", "key.pem", "PEM certificate chain"),
    ],
)
def test_certificates_that_do_not_fit_are_refused_at_the_start(
    certificates: Path, tmp_path: Path, cert: str, key: str | None, says: str
):
    from typer.testing import CliRunner

    from selfloop.cli.main import app

    options = ["--tls-cert", str(certificates / cert)]
    options += [] if key is None else ["--tls-key", str(certificates / key)]
    done = CliRunner().invoke(app, ["serve", "--data-dir", str(tmp_path), "--port", str(stores.free_port()), *options])
    assert done.exit_code == 2
    assert says in re.sub(r"\s+", " ", done.output)


@pytest.fixture(scope="module")
def session(exposed: Gateway) -> dict[str, str]:
    """Everything that is secret, sent wherever a secret is sent; returns all secrets that there are now."""
    admin = exposed.http(KEY)
    made = {
        role: ok(admin.post("/v1/api_keys", json={"name": f"of {role}", "role": role}))["api_key"]
        for role in ("admin", "member", "read-only")
    }
    wire = Wire(exposed, f"tml-{made['member']}")
    run = Run.create(wire_client := exposed.http(made["member"])).attached()
    run.train(1)
    path = run.save("s", "save_weights_for_sampler")
    identity = pyrage.x25519.Identity.generate()
    external = {"model_id": run.id, "seq_id": run.seq + 1, "path": "x"}
    wire.result(
        wire.post("/api/v1/save_weights_external", age_encryption_recipients=[str(identity.to_public())], **external)
    )
    (checkpoint,) = ok(wire_client.get("/v1/loops/checkpoints", params={"checkpoint_path": path}))["checkpoints"]
    files = ok(wire_client.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files"))["presigned_urls"]
    signatures = [httpx.URL(file["url"]).params[SIGNATURE] for file in files]
    for file in files:
        assert exposed.http(None).get(file["url"]).status_code == 200
    tinker_path = path.replace("bt://loops:", "tinker://")
    for token in (made["admin"], SECRETS["a key that is none"]):
        headers = {"X-Tinker-Weights-Access-Token": token}
        wire.http.post("/api/v1/copy_weights", json={"source_path": tinker_path}, headers=headers)
        loaded = {"model_id": run.id, "seq_id": run.seq + 2, "path": tinker_path, "optimizer": False}
        wire.http.post("/api/v1/load_weights", json=loaded | {"weights_access_token": token})
        run.seq += 1
    _refused_everywhere(exposed, checkpoint["id"])
    assert exposed.http(made["read-only"]).post("/v1/loops/sessions", json={}).status_code == 403
    holder = ok(exposed.http(made["admin"]).get("/v1/users/me"))["user_id"]
    ok(admin.delete(f"/v1/api_keys/{holder}"))
    assert exposed.http(made["admin"]).get("/v1/teams").status_code == 401
    exposed.kill_worker()
    run.do("forward", data=[datum(words(1))], loss_fn="cross_entropy", seq=run.seq + 2)
    link_secret = (exposed.data_dir / "link_secret").read_bytes()
    of_links = {f"signature {i}": signature for i, signature in enumerate(signatures)}
    return (
        SECRETS
        | stores.passwords()
        | made
        | of_links
        | {"environment": KEY, "the secret of links": link_secret.hex(), "age": str(identity)}
    )


def _refused_everywhere(exposed: Gateway, checkpoint_id: str) -> None:
    """Wrong secrets, and secrets in wrong places, in requests that end in errors of every kind."""
    keyless, wrong = exposed.http(None), exposed.http(SECRETS["a key that is none"])
    cookie = {"Cookie": f"session={SECRETS['a cookie']}"}
    query = {"expires": "99999999999", "signature": SECRETS["a signature that is none"]}
    assert keyless.get(f"/files/{checkpoint_id}/adapter_config.json", params=query).status_code == 401
    for path in ("/v1/teams", "/loops/runs/x/health", "/api/v1/sessions", "/oai/api/v1/models", "/nowhere"):
        assert wrong.get(path, headers=cookie).status_code == 401
        assert keyless.get(path, headers={"X-API-Key": SECRETS["a key that is none"]}).status_code == 401
    assert wrong.post("/graphql/", json={"query": "{ user { email } }"}).status_code == 401
    holder = exposed.http(KEY)
    url = f"postgresql://user:{SECRETS['a password in a URL']}@127.0.0.1/x"
    for body in ({"base_model": url}, {"session_id": url}, {url: 1}, {"authorization": KEY}):
        assert holder.post("/v1/loops/runs", json=body, headers=cookie).status_code == 422


def test_nothing_secret_is_written_or_said(
    exposed: Gateway, session: dict[str, str], collector: Collector, certificates: Path
):
    http = exposed.http(KEY)
    deployments = ok(http.get("/v1/loops/deployments", params={"scope": "org"}))["deployments"]
    routes = [f"/v1/loops/deployments/{deployment['id']}" for deployment in deployments]
    archives = [file for route in routes for file in ok(http.get(f"{route}/debug_archive/files"))["presigned_urls"]]
    until(lambda: len(collector.received) > 3, "spans have arrived")
    said = {
        "metrics": http.get("/metrics").content,
        "openapi": http.get("/openapi.json").content,
        "logs": b"".join(http.get(f"{route}/logs").content for route in routes),
        "keys": http.get("/v1/api_keys").content,
        "audit": http.get("/api/v1/audit").content,
        "output": exposed.log_path.read_bytes(),
        "spans": b"".join(collector.received),
        **{file["url"]: http.get(file["url"]).content for file in archives},
        **{f"process {p.pid}": " ".join(p.cmdline()).encode() for p in _processes(exposed)},
    }
    for file in exposed.data_dir.rglob("*"):
        if file.is_file() and file.name != "link_secret":
            said[str(file)] = file.read_bytes()
    assert len(said["spans"]) > 1000
    assert b"forward" in said["logs"]
    private_key = (certificates / "key.pem").read_text().splitlines()[1]
    for what, secret in (session | {"private key": private_key}).items():
        for where, content in said.items():
            place = content.find(secret.encode())
            assert place < 0, f"{what} stands in {where}: {content[max(place - 200, 0) : place + 100]!r}"


def test_a_worker_is_given_no_secret(exposed: Gateway, session: dict[str, str]):
    exposed.worker_pid()
    for process in _processes(exposed):
        if process.pid != exposed.pid:
            assert not set(process.environ().values()) & set(session.values())
            assert "SELFLOOP_API_KEY" not in process.environ()


def _processes(exposed: Gateway) -> list[psutil.Process]:
    gateway = psutil.Process(exposed.pid)
    return [gateway, *gateway.children(recursive=True)]


def test_what_the_server_writes_is_for_its_user_alone(exposed: Gateway, session: dict[str, str]):
    """What was there before the server (a copied template) is as it was."""
    assert exposed.data_dir.stat().st_mode & 0o777 == 0o700
    files = ["link_secret", "gateway.lock", "keys_revoked", *([] if stores.ON_SERVERS else ["selfloop.db-wal"])]
    written = [exposed.data_dir / name for name in files]
    written += [
        path for name in ("checkpoints", "cache", "logs", "debug") for path in (exposed.data_dir / name).rglob("*")
    ]
    assert len(written) > 10
    for path in written:
        assert path.stat().st_mode & 0o077 == 0, f"{path}: {path.stat().st_mode:o}"


def test_browsers_are_asked_to_keep_out(exposed: Gateway):
    """On every answer; and no other site is ever let in by CORS."""
    http, asked = exposed.http(KEY), {"Origin": "https://evil.example"}
    preflight = asked | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answers = [
        http.get("/v1/teams", headers=asked),
        http.get("/healthz", headers=asked),
        http.get("/nowhere", headers=asked),
        http.options("/v1/loops/runs", headers=preflight),
        exposed.http(None).options("/v1/loops/runs", headers=preflight),
        exposed.http(None).get("/v1/teams", headers=asked),
    ]
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert http.get("/redoc").status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8000", 200),
        ("api.localhost:8000", 200),
        ("[::1]:8000", 200),
        ("127.9.9.9", 200),
        ("LOCALHOST", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:8000", 421),
        ("10.0.0.1", 421),
        ("localhost, evil.example", 421),
        ("localhost@evil.example", 421),
        ("[2001:db8::1]:80", 421),
    ],
)
def test_a_page_cannot_call_a_local_server_by_a_name_of_its_own(exposed: Gateway, host: str, status: int):
    keyless = exposed.http(None)
    for path in ("/healthz", f"/hf/api/models/{MODEL}", "/openapi.json"):
        assert keyless.get(path, headers={"Host": host}).status_code == status
        for given in (
            {"Authorization": "x"},
            {"Authorization": "Bearer slk-no"},
            {"X-API-Key": "x"},
            {"Upgrade": "websocket", "Connection": "Upgrade"},
        ):
            for method in ("GET", "HEAD", "OPTIONS"):
                answer = keyless.request(method, path, headers={"Host": host} | given)
                assert (answer.status_code == 421) == (status == 421), f"{method} {path} {given}"
    assert exposed.http(KEY).get("/v1/teams", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--public-url", "https://loops.example.org"], False),
        ([], False),
    ],
)
def test_a_server_says_when_keys_can_be_read_on_the_way(tmp_path: Path, options: list[str], warned: bool):
    own = Gateway(tmp_path / "data")
    try:
        own.start(None, *options)
        assert ("without TLS" in own.log_path.read_text()) == warned
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "data" / "api_key").stat().st_mode & 0o777 == 0o600
        assert stores.ON_SERVERS or (tmp_path / "data" / "selfloop.db").stat().st_mode & 0o077 == 0
        host = {"Host": "loops.example.org"}
        named = own.http(None).get("/healthz", headers=host).status_code
        assert named == (200 if options else 421)
    finally:
        own.close()
