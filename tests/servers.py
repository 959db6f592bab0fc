"""Local servers for the tests of downloads: a hub that speaks what huggingface_hub asks for, with
failures on demand, and S3 (moto's).
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import urlopen

import boto3
from moto.server import ThreadedMotoServer

LFS_FROM = 1000  # bytes: larger files are kept apart from git, as the hub does


class Hub:
    """Repositories by (kind, id), each {path: bytes}.

    Requests are logged in `log`. A test sets what goes wrong:
    `cut`: bytes after which the connection breaks, one number a request, by path.
    `corrupted`: paths whose content is another of the same length.
    `refused`: (status, X-Error-Code) by repository id.
    `gone`: paths that the listing has and the download has not.
    """

    def __init__(self, repos, page=1000):
        self.repos, self.page = repos, page
        self.revisions = {"main", "v2.0", "9947586218b6b7c8cab804009ddca5045249a38d"}
        self.cut, self.corrupted, self.refused, self.gone = {}, set(), {}, set()
        self.ranges, self.log, self.url = True, [], ""

    def commit(self, kind, repo):
        return hashlib.sha1(f"{kind} {repo}".encode()).hexdigest()

    def requested_ranges(self, path):
        """Range headers of the requests for a file's content, in order; "" for none."""
        return [
            header
            for method, where, header, _ in self.log
            if method == "GET" and where.startswith("/cdn/") and where.endswith(path)
        ]


def git_sum(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        if "Content-Length" not in (
            headers := {k.replace("_", "-"): v for k, v in headers.items()}
        ):
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer(self):
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        self.hub.log.append(
            (
                self.command,
                path,
                self.headers.get("Range", ""),
                self.headers.get("Authorization", ""),
            )
        )
        if match := re.fullmatch(
            r"/api/(model|dataset)s/([^/]+/[^/]+)/(revision|tree)/([^/]+)(?:/(.*))?", path
        ):
            kind, repo, what, revision, folder = match.groups()
        elif match := re.fullmatch(r"/(cdn/)?(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            kind, repo, what, revision, folder = (
                "dataset" if match[2] else "model",
                match[3],
                "cdn" if match[1] else "file",
                match[4],
                match[5],
            )
        else:
            return self.send(404)
        if repo in self.hub.refused or (kind, repo) not in self.hub.repos:
            status, code = self.hub.refused.get(repo, (401, "RepoNotFound"))
            return self.send(status, **({"X_Error_Code": code} if code else {}))
        commit = self.hub.commit(kind, repo)
        if revision not in {*self.hub.revisions, commit}:
            return self.send(404, X_Error_Code="RevisionNotFound")
        files = self.hub.repos[kind, repo]
        if what == "revision":
            return self.send_json(
                {
                    "id": repo,
                    "sha": commit,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [],
                }
            )
        if what == "tree":
            return self.tree(files, folder or "", query)
        if folder not in files or folder in self.hub.gone:
            return self.send(404, X_Error_Code="EntryNotFound")
        return self.content(files[folder], folder, commit, what)

    def send_json(self, value, **headers):
        self.send(200, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def tree(self, files, folder, query):
        prefix = f"{folder}/" if folder else ""
        inside = {
            path: content for path, content in sorted(files.items()) if path.startswith(prefix)
        }
        if not inside:
            return self.send(404, X_Error_Code="EntryNotFound")
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        entries = []
        for path, content in inside.items():
            below = path.removeprefix(prefix)
            if "/" in below and not deep:
                entry = {
                    "type": "directory",
                    "oid": "0" * 40,
                    "path": prefix + below.split("/")[0],
                    "size": 0,
                }
            else:
                entry = {
                    "type": "file",
                    "oid": git_sum(content),
                    "path": path,
                    "size": len(content),
                }
                if len(content) >= LFS_FROM:
                    entry["lfs"] = {
                        "oid": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 134,
                    }
            if entry not in entries:
                entries.append(entry)
        start = int(query.get("cursor", ["0"])[0])
        more = start + self.hub.page < len(entries)
        query_now = f"recursive={deep}&expand=False&cursor={start + self.hub.page}"
        link = (
            {"Link": f'<{self.hub.url}{urlsplit(self.path).path}?{query_now}>; rel="next"'}
            if more
            else {}
        )
        return self.send_json(entries[start : start + self.hub.page], **link)

    def content(self, content, path, commit, what):
        large = len(content) >= LFS_FROM
        tag = f'"{hashlib.sha256(content).hexdigest() if large else git_sum(content)}"'
        about = {"X_Repo_Commit": commit, "ETag": tag}
        if what == "file" and self.command == "HEAD" and not large:
            return self.send(200, Content_Length=str(len(content)), **about)
        if what == "file":  # the content lies on another server
            return self.send(
                302,
                Location=f"/cdn{urlsplit(self.path).path}",
                X_Linked_Size=str(len(content)),
                X_Linked_ETag=tag,
                **about,
            )
        if path in self.hub.corrupted:
            content = bytes(255 - byte for byte in content)
        start, total, status = 0, len(content), 200
        if self.hub.ranges and (
            match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        ):
            start, status = int(match[1]), 206
            if start >= total:
                return self.send(416, Content_Range=f"bytes */{total}")
            about["Content_Range"] = f"bytes {start}-{total - 1}/{total}"
        rest, limits = content[start:], self.hub.cut.get(path, [])
        shorter = rest[: limits.pop(0)] if limits else rest
        self.send(status, shorter, Content_Length=str(len(rest)), **about)
        if len(shorter) < len(rest):
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)


@contextmanager
def serving(handler, **attributes):
    """A running server; its handler class has the attributes."""
    kind = type(
        "Server",
        (ThreadingHTTPServer,),
        {"request_queue_size": 128, "daemon_threads": True, "block_on_close": False},
    )
    server = kind(("127.0.0.1", 0), type("Handler", (handler,), attributes))
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_server(repos, **options):
    """A running hub; its address is `.url`."""
    hub = Hub(repos, **options)
    with serving(_Handler, hub=hub) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield hub


@contextmanager
def s3_server(bucket, objects, in_parts=()):
    """A running S3 server with one public bucket {key: bytes}; keys of `in_parts` are uploaded in
    two parts.

    Yields its address.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        region_name="us-east-2",
        endpoint_url=url,
        aws_access_key_id="owner",
        aws_secret_access_key="of the bucket",
    )
    client.create_bucket(
        Bucket=bucket,
        ACL="public-read",
        CreateBucketConfiguration={"LocationConstraint": "us-east-2"},
    )
    for key, content in objects.items():
        if key not in in_parts:
            client.put_object(Bucket=bucket, Key=key, Body=content, ACL="public-read")
            continue
        upload = client.create_multipart_upload(Bucket=bucket, Key=key, ACL="public-read")[
            "UploadId"
        ]
        half, done = 5 * 2**20, []  # the least that S3 takes for a part
        for number, block in enumerate((content[:half], content[half:]), 1):
            tag = client.upload_part(
                Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=block
            )["ETag"]
            done.append({"ETag": tag, "PartNumber": number})
        client.complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": done}
        )
    try:
        yield url
    finally:
        urlopen(f"{url}/moto-api/reset", data=b"")  # what is stored outlives the server
        server.stop()
