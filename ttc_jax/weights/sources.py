"""Sources of weights: a path, or an address whose file is copied to a cache.

  random                                          no file: random parameters
  ViT-B_16.npz                                    a path
  gs://vit_models/augreg/S_16.npz, https://...    whatever fsspec opens
  hf://owner/name[@revision][/file]               the Hugging Face Hub
  howto-i21k-B/16                                 a short name of `released`

Any of the last four may end with "#sha256=HEX", the file's expected hash. An
.npz may end with ":img", as in Big Vision: of a file with several models, the
tensors below that name alone. A folder stands for its model.safetensors or, of
a model in several files, for its model.safetensors.index.json; the hash of an
index covers all files.
"""
from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import re
from typing import Any, NamedTuple

from absl import logging

from ttc_jax import files
from ttc_jax.errors import UserError
from ttc_jax.weights import released

INDEX = ".safetensors.index.json"
_MAIN = ("model.safetensors", "model" + INDEX)
_BLOCK = 2 ** 22  # bytes of one read while a download resumes
RANDOM = "random"
_SCHEMES = ("https", "gs", "hf")
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def public(source: str) -> str:
  """Returns a source without passwords: an address loses its user, query and
  fragment; a path stays as it is.

  Every message, row, note and bundle shows a source in this form.

  Example:
    >>> public("https://me:secret@host/a.npz?X-Amz-Signature=1")
    'https://host/a.npz'
  """
  scheme, mark, rest = source.partition("://")
  if not mark:
    return source
  host, slash, path = re.split(r"[?#]", rest)[0].partition("/")
  return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def check_scheme(source: str) -> None:
  """Raises UserError for an address that is not fetched.

  Only https, gs and hf are, and http from this machine: fsspec would also open
  chains with "::", files of other users and other protocols, and an address may
  come from a stranger's bundle.
  """
  scheme, mark, rest = source.partition("://")
  if not mark:
    return
  if "::" in source.replace("[::1]", ""):
    raise UserError(f"weights '{public(source)}': chains with '::' are not "
                    "followed: give one https://, gs:// or hf:// address")
  if scheme in _SCHEMES:
    return
  host = re.split(r"[/?#]", rest)[0].rpartition("@")[2]
  if scheme == "http" and re.sub(r":\d+$", "", host) in _LOCAL_HOSTS:
    return
  fix = {"http": "use https://",
         "file": "give the path alone, or an https:// address"}.get(
             scheme, "use https://, gs:// or hf://")
  raise UserError(f"weights '{public(source)}': {scheme[:20]}:// is not "
                  f"fetched: {fix}")


def _scrub(text: str, source: str) -> str:
  """Removes the secrets of a source from an error message."""
  text = re.sub(r"\w+://[^\s'\")]+", lambda m: public(m[0]), text)
  rest = source.partition("://")[2]
  user = re.split(r"[/?#]", rest)[0].rpartition("@")[0]
  query = rest.partition("?")[2].partition("#")[0]
  for secret in (query, user, user.partition(":")[2],
                 *(part.partition("=")[2] for part in query.split("&"))):
    if len(secret) > 3:
      text = text.replace(secret, "...")
  return text


class Source(NamedTuple):
  """A source of weights that was found: it is located and hashed once.

  Attributes:
    source: as the user named it; it may hold a password, see `public`.
    path: of the local file, perhaps with a part, see `split_part`; None for
      "random".
    sha256: hexadecimal; "random" for "random".
  """
  source: str
  path: str | None
  sha256: str

  @property
  def name(self) -> str:
    """The file's name, for tables: "ViT-B_16.npz"."""
    return os.path.basename(public(self.source))

  @property
  def address(self) -> str:
    """The source without passwords, of use in any working directory: local
    paths are absolute."""
    local, part = split_part(os.path.expanduser(self.source))
    return (join_part(os.path.abspath(local), part) if os.path.exists(local)
            else public(self.source))

  @property
  def part(self) -> str:
    """The part of the file, see `split_part`, or ""."""
    return split_part(self.path or "")[1]

  @property
  def configured(self) -> bool:
    """Whether a config.json beside the file tells how it is read."""
    return self.path is not None and os.path.isfile(
        os.path.join(os.path.dirname(self.path), "config.json"))


def open_source(source: str, cache: str | None = None) -> Source:
  """Locates and hashes a source; remote files are fetched.

  Args:
    source: as in this module's docstring; "random" is one.
    cache: as of `locate`.

  Raises:
    UserError: as of `locate`.

  Example:
    >>> source = weights.open_source("hf://google/vit-base-patch16-224-in21k")
    >>> module, params = weights.load("vit_b16", source, image_size=224)
  """
  source = os.fspath(source)
  if source == RANDOM:
    return Source(source, None, RANDOM)
  source = released.resolve(source)
  path = locate(source, cache)
  return Source(source, path, sha256(path))


def locate(source: str, cache: str | None = None, fresh: bool = False) -> str:
  """Returns the path of the local file of a source, fetched if need be.

  Args:
    source: as in this module's docstring.
    cache: folder of the downloads, by default $XDG_CACHE_HOME (or ~/.cache)
      /ttc_jax/weights; for hf://, the Hub's own cache.
    fresh: asks the server whether the copy in the cache is still its file, and
      fetches it again where it is not; of weights, whose addresses stand for
      one file, nobody is asked.

  Raises:
    UserError: no such file, a failed download (the next call resumes it), a
      hash that differs, or a library that is not installed.
  """
  source = released.resolve(os.fspath(source))
  check_scheme(source)
  address, _, wanted = source.partition("#sha256=")
  if "#sha256=" in source and not re.fullmatch("[0-9a-f]{64}", wanted):
    raise UserError(
        f"weights '{public(source)}': the hash after '#sha256=' needs 64 "
        "lower-case hexadecimal digits")
  address, part = split_part(address)
  return join_part(_locate(address, wanted, cache, fresh), part)


def _locate(address, wanted, cache, fresh):
  """The path of the local file of an address without hash and part."""
  if "://" in address and not address.startswith("hf://"):
    return _download(address, wanted, cache or default_cache(), fresh)
  path = (_from_hub(address, cache) if "://" in address
          else os.path.expanduser(address))
  path = next((inside for name in _MAIN if os.path.isfile(
      inside := os.path.join(path, name))), path)
  if os.path.isdir(path):
    raise UserError(f"'{path}' is a folder without {' or '.join(_MAIN)}: name "
                    "the file of weights")
  if not os.path.isfile(path):
    raise UserError(f"weights file '{path}' does not exist"
                    + released.near(address))
  files.utf8(path)
  if wanted:
    _check(address, sha256(path), wanted)
  return path


def split_part(source: str) -> tuple[str, str]:
  """Splits "FILE.npz:img" into the file and the name of the part, or "".

  As in Big Vision's `utils.load_params`, the part is the tree below that name;
  here of .npz files alone. A file that exists is no part of another.

  Example:
    >>> split_part("gs://big_vision/siglip/a.npz:img")
    ('gs://big_vision/siglip/a.npz', 'img')
  """
  match = re.fullmatch(r"(.*\.npz):(\w+(?:/\w+)*)", source)
  if match is None or os.path.isfile(source):
    return source, ""
  return match[1], match[2]


def join_part(path: str, part: str) -> str:
  """Inverse of `split_part`."""
  return f"{path}:{part}" if part else path


def default_cache() -> str:
  """Returns the folder of the downloads."""
  return files.cache_folder("weights")


def sha256(path: str) -> str:
  """Returns the file's SHA-256, hexadecimal, without holding it in memory.

  Of an index: that of the list of the hashes of the index and its files. Of a
  part (`split_part`): that of the whole file.
  """
  path, _ = split_part(path)
  def of_file(path):
    with open(path, "rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()
  if not path.endswith(INDEX):
    return of_file(path)
  folder = os.path.dirname(path)
  names = [os.path.basename(path), *sorted(set(shards(path).values()))]
  lines = [f"{of_file(os.path.join(folder, n))}  {n}\n" for n in names]
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def shards(path: str) -> dict[str, str]:
  """Reads the index of sharded safetensors: {tensor: file beside the index}.

  Raises:
    UserError: no such index, a file that is not there, or a name that is no
      plain file name.
  """
  map_ = _weight_map(path)
  for name in sorted(set(map_.values())):
    if not os.path.isfile(os.path.join(os.path.dirname(path), name)):
      raise UserError(f"weights file '{path}' names '{name}', which is not "
                      "beside it: fetch all files of the model")
  return map_


def _weight_map(path):
  read = _read_json(path)
  map_ = read.get("weight_map") if read else None
  if not isinstance(map_, dict) or not map_:
    raise UserError(f"weights file '{path}' is no index of sharded "
                    "safetensors: it has no 'weight_map'")
  for name in map_.values():
    # The index is not trusted: it may name files beside it only.
    if not isinstance(name, str) or not re.fullmatch(
        r"[\w.-]+\.safetensors", name):
      raise UserError(f"weights file '{path}' names the file {name!r}; "
                      "expected plain names that end in .safetensors")
  return map_


def _check(address, found, wanted):
  if found != wanted:
    raise UserError(
        f"weights '{public(address)}' have the sha256 {found}, expected "
        f"{wanted}: correct the hash, or the source")


@contextlib.contextmanager
def _remote(address: str) -> Iterator[None]:
  """Turns the errors of remote file systems into one sentence."""
  try:
    yield
  except UserError:
    raise
  except ImportError as e:
    raise UserError(
        f"weights '{public(address)}' need a library that is not installed "
        f"({e}): pip install -e '.[hub]'") from e
  except Exception as e:  # Every file system has errors of its own.
    # fsspec reports a silent server as a missing file; the cause is right.
    cause = e.__cause__ or e
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())
    reason = _scrub(reason, address)[:300]
    raise UserError(
        f"weights '{public(address)}' cannot be fetched ({reason}): check the "
        "address, or run again; a broken download resumes") from e


def _download(url: str, wanted: str, cache: str, fresh: bool) -> str:
  """Returns the path of a verified copy in the cache, fetched if need be."""
  stem = re.sub(r"[^\w.-]", "_", public(url).rsplit("/", 1)[-1])
  key = hashlib.sha256(url.encode()).hexdigest()[:16]
  path = os.path.join(cache, f"{key}-{stem[-100:]}")
  # Processes of a host may start at the same time.
  with _remote(url), files.lock(path + ".lock", wait=True):
    record = _read_json(path + ".json")
    if os.path.isfile(path) and record and record.get("sha256"):
      found = sha256(path)
      if found == record["sha256"] and wanted in ("", found) and (
          not fresh or _is_current(url, record)):
        return path
    part = path + ".part"
    version = _fetch(url, part)
    found = sha256(part)
    if wanted and found != wanted:
      os.remove(part)
      _check(url, found, wanted)
    _write_json(path + ".json", {
        "url": public(url), "sha256": found, "version": version})
    os.replace(part, path)
  return path


def _version(info: dict[str, Any]) -> dict[str, str]:
  """What changes when a remote file does."""
  return {key: str(info[key]) for key in (
      "size", "ETag", "etag", "generation", "Last-Modified", "created")
          if info.get(key) is not None}


def _is_current(url: str, record: dict[str, Any]) -> bool:
  """Tells whether a copy is the server's file, as far as it answers."""
  if not isinstance(record.get("version"), dict):
    return True  # of an earlier release
  try:
    fs, path = files.remote(url)
    version = _version(fs.info(path))
  except Exception as error:  # of networks and file systems
    logging.warning("%s cannot be asked whether it has changed (%s): the copy "
                    "in the cache is used", public(url), type(error).__name__)
    return True
  return version == record["version"]


def _fetch(url: str, part: str) -> dict[str, str]:
  """Completes the file `part`, from where an earlier call left it; returns
  its version."""
  fs, path = files.remote(url)
  info = fs.info(path)
  # Half a file is worth keeping only if the other half belongs to it.
  version = _version(info)
  if not version or _read_json(part + ".json") != version:
    open(part, "wb").close()
    _write_json(part + ".json", version)
  size = info.get("size")
  while (start := os.path.getsize(part)) != size:
    try:
      _append(fs, path, part, start)
      break
    except Exception:
      # Cut short after some bytes: that deserves another attempt.
      if os.path.getsize(part) <= start:
        raise
  arrived = os.path.getsize(part)
  if size is not None and arrived != size:
    if arrived > size:
      os.remove(part)
    raise OSError(f"{arrived} of {size} bytes arrived")
  os.remove(part + ".json")
  return version


def _append(fs: Any, path: str, part: str, start: int) -> None:
  """Fetches the bytes from `start` on, or all if the server has no ranges."""
  if start:
    with contextlib.suppress(ValueError, NotImplementedError):
      with (fs.open(path, "rb", block_size=_BLOCK) as f,
            open(part, "ab") as out):
        f.seek(start)
        while block := f.read(_BLOCK):
          out.write(block)
      return
  fs.get_file(path, part)


def _from_hub(address: str, cache: str | None) -> str:
  match = re.fullmatch(
      r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", address)
  if not match:
    raise UserError(
        f"weights '{public(address)}' are no hf://owner/name[@revision][/file]")
  repo, revision, file = match.groups()
  with _remote(address):
    import huggingface_hub as hub
    file = file or _main_file(
        address, hub.HfApi().list_repo_files(repo, revision=revision))
    def fetch(name):
      return hub.hf_hub_download(
          repo, os.path.join(os.path.dirname(file), name), revision=revision,
          cache_dir=cache)
    path = fetch(os.path.basename(file))
    for name in ("config.json", "preprocessor_config.json"):
      try:
        fetch(name)  # which GELU, pooling and normalisation
      except hub.errors.LocalEntryNotFoundError:  # the Hub did not answer
        # Fine if it has said before that there is none.
        if hub.try_to_load_from_cache(repo, os.path.join(os.path.dirname(
            file), name), cache_dir=cache, revision=revision) is None:
          raise
      except hub.errors.EntryNotFoundError:
        pass
    if path.endswith(INDEX):
      for name in sorted(set(_weight_map(path).values())):
        fetch(name)
    return path


def _main_file(address, files):
  for name in _MAIN:
    if name in files:
      return name
  files = [f for f in files if f.endswith((".safetensors", ".npz", ".pth"))]
  if len(files) != 1:
    raise UserError(
        f"weights '{address}' hold {len(files)} weights files; name one: "
        f"{', '.join(f'{address}/{f}' for f in files) or 'there is none'}")
  return files[0]


def _read_json(path):
  try:
    value = files.read_json(path)
    return value if isinstance(value, dict) else None
  except (OSError, ValueError):
    return None


def _write_json(path, value):
  with open(path, "w", encoding="utf-8") as f:
    json.dump(value, f)
