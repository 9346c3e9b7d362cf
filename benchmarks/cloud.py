"""What a rehearsal plays of Google Cloud on one machine, all of it on loopback."""

import contextlib
import http.server
import socket
import sys
import threading
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


def attributes(slices: int, workers: int, slice_id: int, worker: int) -> dict[str, str]:
    """What the metadata server says to `worker` of `workers` in one of the slices.

    The address of every worker is loopback: they differ in their processes alone.
    """
    tpu_env = {"ACCELERATOR_TYPE": "v4-8", "WORKER_ID": worker}
    if slices > 1:
        tpu_env |= {
            "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1", "MEGASCALE_NUM_SLICES": slices,
            "MEGASCALE_SLICE_ID": slice_id,
        }  # fmt: skip
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
