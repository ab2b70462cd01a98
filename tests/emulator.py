"""Cloud storage on this machine: an emulator that counts its requests, and lets some fail."""

import contextlib
import functools
import http.server
import threading
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class Emulator:
    """A server with one bucket.

    Attributes:
      requests: method and path of each request, by the port that it came to.
      drop_every: of so many requests, one is answered by closing the connection.
      dropped: how many were.
      refuses: whether nobody is let in.
    """

    def __init__(self):
        self.requests = {}
        self.drop_every = None
        self.dropped = 0
        self.refuses = False
        self._storage = Storage(use_memory_fs=True)
        buckets.create_bucket(BUCKET, self._storage)
        self._lock = threading.Lock()
        self._servers = []

    def listen(self) -> str:
        """Opens another port; returns its address."""
        emulator = self

        class Handler(RequestHandler):
            def handle_one_request(self):
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def parse_request(self):
                if not super().parse_request():
                    return False
                seen = emulator.requests.setdefault(self.server.server_port, [])
                with emulator._lock:
                    seen.append((self.command, unquote(self.path)))
                    count = sum(map(len, emulator.requests.values()))
                    drop = emulator.drop_every and count % emulator.drop_every == 0
                    emulator.dropped += bool(drop)
                return not drop

            def answer(self, method):
                if emulator.refuses:
                    self.send_error(403)
                    return
                with emulator._lock:  # The emulator's storage is for one request at a time.
                    status = self.precondition(method)
                    if status != 200:
                        self.send_response(status)
                        self.send_header("Content-Length", "0")
                        self.end_headers()
                        return
                    getattr(super(), f"do_{method}")()

            # What TensorStore asks for besides, and the emulator leaves out.

            def generation(self):
                url = urlparse(self.path)
                name = parse_qs(url.query).get("name", [unquote(url.path.partition("/o/")[2])])[0]
                try:
                    return emulator._storage.get_file_obj(BUCKET, name)["generation"]
                except NotFound:
                    return "0"

            def precondition(self, method):
                query = parse_qs(urlparse(self.path).query)
                if "name" not in query and method == "POST":
                    return 200
                if query.get("ifGenerationMatch", [self.generation()])[0] != self.generation():
                    return 412
                return 304 if query.get("ifGenerationNotMatch") == [self.generation()] else 200

            def end_headers(self):
                if "alt=media" in self.path:
                    self.send_header("x-goog-generation", self.generation())
                super().end_headers()

            def do_GET(self):  # noqa: N802
                self.answer("GET")

            def do_POST(self):  # noqa: N802
                self.answer("POST")

            def do_PUT(self):  # noqa: N802
                self.answer("PUT")

            def do_DELETE(self):  # noqa: N802
                self.answer("DELETE")

            def do_PATCH(self):  # noqa: N802
                self.answer("PATCH")

        handler = functools.partial(Handler, self._storage)
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    def close(self):
        for server in self._servers:
            server.shutdown()
            server.server_close()


def environment(address: str) -> dict[str, str]:
    """What has gcsfs, TensorStore and TensorBoard use a server."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        # The emulator has no gRPC, through which gcsfs would ask what kind a bucket is of.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
