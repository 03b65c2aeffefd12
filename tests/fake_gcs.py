"""A bucket on this machine: as much of Cloud Storage's JSON API as gcsfs, tensorstore and ArrayRecord speak with.

`with Server() as server:` holds the objects in `server.objects`, {"BUCKET/NAME": bytes}; clients find it by
`server.environment`. A request for a bucket not in `server.buckets` is answered as Cloud Storage would.
"""

import email
import http.server
import importlib.util
import itertools
import json
import re
import sys
import threading
import urllib.parse

import pytest

# Not by importing it: it reads `Server.environment` when it is first imported.
needs_gcsfs = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")


class Server(http.server.ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1 while in its `with`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets, self.forbidden = set(buckets or ("bucket",)), set()
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.count, self.lock = itertools.count(1), threading.RLock()
        url = f"http://127.0.0.1:{self.server_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": url,  # the arrays of Orbax
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # ArrayRecord
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gcsfs would ask for a bucket's kind by gRPC
        }

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # gcsfs gives up requests whose answer it no longer needs

    def put(self, key: str, data: bytes) -> dict:
        with self.lock:
            self.objects[key], self.generations[key] = bytes(data), next(self.count)
            return self.described(key)

    def described(self, key: str) -> dict:
        bucket, _, name = key.partition("/")
        time, generation = "2026-01-01T00:00:00.000Z", str(self.generations[key])
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(self.objects[key])),
            "generation": generation, "metageneration": "1", "timeCreated": time, "updated": time,
        }  # fmt: skip

    def listed(self, bucket: str, prefix: str, delimiter: str) -> dict:
        items, prefixes = [], set()
        with self.lock:
            for key in sorted(key for key in self.objects if key.startswith(f"{bucket}/{prefix}")):
                rest = key[len(f"{bucket}/{prefix}") :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
                else:
                    items.append(self.described(key))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def _answer(self) -> None:
        body = self._body()
        status, found, headers = self._respond(self.command, self.path, body)
        data = found if isinstance(found, bytes) else b"" if found is None else json.dumps(found).encode()
        self.send_response(status)
        headers.setdefault(
            "Content-Type", "application/octet-stream" if isinstance(found, bytes) else "application/json"
        )
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, *_):
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _respond(self, method: str, target: str, body: bytes) -> tuple[int, dict | bytes | None, dict[str, str]]:
        url = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(url.query))
        if not (
            match := re.match(r"(?:/upload|/download|/resumable)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?$", url.path)
        ):
            return 501, {"error": {"code": 501, "message": f"the fake has no {method} {target}"}}, {}
        bucket, name = match[1], urllib.parse.unquote(match[2] or "")
        if bucket in self.server.forbidden:
            return 403, {"error": {"code": 403, "message": "caller does not have storage.objects.list access"}}, {}
        if bucket not in self.server.buckets:
            return 404, {"error": {"code": 404, "message": "The specified bucket does not exist."}}, {}
        if url.path.startswith("/upload/"):
            return self._upload(method, bucket, query, body)
        if not name:
            if url.path.endswith("/o"):
                return 200, self.server.listed(bucket, query.get("prefix", ""), query.get("delimiter", "")), {}
            return 200, {"kind": "storage#bucket", "name": bucket, "locationType": "region"}, {}
        return self._object(method, f"{bucket}/{name}", query)

    def _object(self, method: str, key: str, query: dict) -> tuple[int, dict | bytes | None, dict[str, str]]:
        with self.server.lock:
            if key not in self.server.objects:
                return 404, {"error": {"code": 404, "message": f"No such object: {key}"}}, {}
            if (refusal := self._precondition(key, query)) is not None:
                return refusal
            if method == "DELETE":
                del self.server.objects[key]
                return 204, None, {}
            if query.get("alt") != "media":
                return 200, self.server.described(key), {}
            data, headers = self.server.objects[key], {"x-goog-generation": str(self.server.generations[key])}
        if not (span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            return 200, data, headers
        first = int(span[1]) if span[1] else max(0, len(data) - int(span[2]))
        last = min(int(span[2]), len(data) - 1) if span[1] and span[2] else len(data) - 1
        if first > last:
            return 416, None, {"Content-Range": f"bytes */{len(data)}"}
        return 206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}

    def _precondition(self, key: str, query: dict) -> tuple[int, dict | None, dict[str, str]] | None:
        generation = self.server.generations[key] if key in self.server.objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return 412, {"error": {"code": 412, "message": "conditionNotMet"}}, {}
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            return 304, None, {}
        return None

    def _upload(self, method: str, bucket: str, query: dict, body: bytes) -> tuple[int, dict | None, dict[str, str]]:
        with self.server.lock:
            if "upload_id" in query:  # a part of a resumable upload
                key, parts = self.server.uploads[query["upload_id"]]
                parts += body
                if self.headers.get("Content-Range", "").endswith("/*"):
                    return 308, None, {"Range": f"bytes=0-{len(parts) - 1}"}
                return 200, self.server.put(key, parts), {}
            kind = query.get("uploadType")
            if kind == "multipart":
                head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                described, content = email.message_from_bytes(head + body).get_payload()
                name, body = json.loads(described.get_payload())["name"], content.get_payload(decode=True)
            else:
                name = query.get("name") or json.loads(body)["name"]
            key = f"{bucket}/{name}"
            if (refusal := self._precondition(key, query)) is not None:
                return refusal
            if kind == "resumable":
                upload = str(next(self.server.count))
                self.server.uploads[upload] = key, bytearray()
                place = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o?upload_id={upload}"
                return 200, {}, {"Location": place}
            return 200, self.server.put(key, body), {}
