"""A Google Cloud Storage of the test's own: the requests that gcsfs makes.

Objects in memory, with generations: a request with `ifGenerationMatch=0` makes
an object only where there is none, as the real store does. Written from the
JSON API's documentation (cloud.google.com/storage/docs/json_api/v1).
"""
import base64
from collections.abc import Iterator
import contextlib
import hashlib
from http import server
import json
import sys
import threading
from urllib import parse

BUCKET = "b"


class Objects:
  """{name: (generation, content)}, under a lock."""

  def __init__(self):
    self.lock, self.contents, self.uploads = threading.Lock(), {}, {}
    self.generation = 0

  def put(self, name, content, match=None):
    with self.lock:
      if match == "0" and name in self.contents:
        return False
      self.generation += 1
      self.contents[name] = self.generation, content
      return True


def _resource(name, generation, content):
  digest = base64.b64encode(hashlib.md5(content).digest()).decode()
  return {"kind": "storage#object", "name": name, "bucket": BUCKET,
          "id": f"{BUCKET}/{name}/{generation}", "size": str(len(content)),
          "generation": str(generation), "md5Hash": digest,
          "timeCreated": "2026-01-01T00:00:00.000Z",
          "updated": "2026-01-01T00:00:00.000Z"}


class Handler(server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *args):
    pass

  @property
  def objects(self):
    return self.server.objects

  def _answer(self, status, value=b"", **headers):
    if not isinstance(value, bytes):
      value = json.dumps(value).encode()
    self.send_response(status)
    for key, text in headers.items():
      self.send_header(key.replace("_", "-"), text)
    self.send_header("Content-Length", str(len(value)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(value)

  def _fail(self, status):
    self._answer(status, {"error": {"code": status, "message": "no"}},
                 Content_Type="application/json")

  def _request(self):
    """-> (name of the object or None, {parameter: value})."""
    url = parse.urlsplit(self.path)
    query = {k: v[0] for k, v in parse.parse_qs(url.query).items()}
    _, found, name = url.path.partition("/o/")
    return (parse.unquote(name) if found else None), query

  def do_GET(self):
    name, query = self._request()
    if name is None:
      return self._list(query)
    if name not in self.objects.contents:
      return self._fail(404)
    generation, content = self.objects.contents[name]
    if query.get("alt") == "media":
      return self._media(content)
    self._answer(200, _resource(name, generation, content),
                 Content_Type="application/json")

  def _media(self, content):
    span = self.headers.get("Range")
    if not span:
      return self._answer(200, content,
                          Content_Type="application/octet-stream")
    first, _, last = span.removeprefix("bytes=").partition("-")
    stop = int(last) + 1 if last else len(content)
    part = content[int(first):stop]
    self._answer(206, part, Content_Type="application/octet-stream",
                 Content_Range=f"bytes {first}-{stop - 1}/{len(content)}")

  def _list(self, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    items, prefixes = [], {}
    with self.objects.lock:
      found = sorted(self.objects.contents.items())
    for name, (generation, content) in found:
      if not name.startswith(prefix):
        continue
      head, inner, _ = name[len(prefix):].partition(delimiter or "\0")
      if inner:
        prefixes[prefix + head + delimiter] = None
      else:
        items.append(_resource(name, generation, content))
    most = int(query.get("maxResults", 1000))
    self._answer(200, {"kind": "storage#objects", "items": items[:most],
                       "prefixes": [*prefixes]},
                 Content_Type="application/json")

  def do_POST(self):
    _, query = self._request()
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    if self.path.startswith("/batch"):
      return self._batch(body)
    if "upload_id" in query:
      return self._continue(body, query["upload_id"])
    if query.get("uploadType") == "resumable":
      return self._begin(json.loads(body)["name"], query)
    # By hand: a parser of mail would change what is no text.
    boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"')
    end = f"\n--{boundary}".encode()
    about, _, rest = body.partition(b"\n\n")[2].partition(end)
    content = rest.partition(b"\n\n")[2][:-len(end) - 2]
    name = json.loads(about)["name"]
    self._put(name, content, query)

  def _put(self, name, content, query):
    if not self.objects.put(name, content, query.get("ifGenerationMatch")):
      return self._fail(412)
    self._answer(200, _resource(name, *self.objects.contents[name]),
                 Content_Type="application/json")

  def _begin(self, name, query):
    """An upload in pieces, which follow at an address of its own."""
    query["name"], query["upload_id"] = name, str(id(query))
    self.objects.uploads[query["upload_id"]] = query, bytearray()
    self._answer(200, {}, Location=(
        f"http://{self.headers['Host']}/upload/o?"
        + parse.urlencode({"upload_id": query["upload_id"]})))

  def _continue(self, piece, upload):
    query, content = self.objects.uploads[upload]
    content += piece
    total = self.headers["Content-Range"].rpartition("/")[2]
    if total == "*" or int(total) > len(content):
      return self._answer(308, Range=f"bytes=0-{len(content) - 1}")
    self._put(query["name"], bytes(content), query)

  def _batch(self, body):
    """Deletions in one request."""
    boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"')
    out = []
    for part in body.split(f"--{boundary}".encode())[1:-1]:
      line = next(x for x in part.decode().splitlines()
                  if x.startswith("DELETE "))
      name = parse.unquote(line.split()[1].partition("/o/")[2].split("?")[0])
      with self.objects.lock:
        gone = self.objects.contents.pop(name, None)
      out.append(f"--{boundary}\r\nContent-Type: application/http\r\n\r\n"
                 f"HTTP/1.1 {'204 No Content' if gone else '404 Not Found'}"
                 "\r\n\r\n\r\n")
    self._answer(200, ("".join(out) + f"--{boundary}--").encode(),
                 Content_Type=f"multipart/mixed; boundary={boundary}")

  def do_DELETE(self):
    name, _ = self._request()
    with self.objects.lock:
      gone = self.objects.contents.pop(name, None)
    return self._answer(204) if gone else self._fail(404)


class Server(server.ThreadingHTTPServer):
  daemon_threads = True

  def handle_error(self, request, client_address):
    """A client that was killed is no news; any other error is."""
    if not isinstance(sys.exc_info()[1], ConnectionError):
      super().handle_error(request, client_address)


@contextlib.contextmanager
def running() -> Iterator[tuple[Objects, dict[str, str]]]:
  """Gives (the objects, environment variables by which gcsfs finds them)."""
  http = Server(("127.0.0.1", 0), Handler)
  http.objects = Objects()
  thread = threading.Thread(target=http.serve_forever, daemon=True)
  thread.start()
  try:
    yield http.objects, {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{http.server_port}",
        "FSSPEC_GS_TOKEN": "anon",
        # Else it asks for the kind of bucket, by gRPC.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
  finally:
    http.shutdown()
    http.server_close()
