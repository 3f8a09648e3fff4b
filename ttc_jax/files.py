"""Files that appear whole or not at all."""
from collections.abc import Iterator
import contextlib
import os
from typing import BinaryIO
import uuid


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
  """A file to write, renamed to `path` when the block ends well."""
  temporary = f"{path}.{uuid.uuid4().hex}.tmp"
  try:
    with open(temporary, "xb") as file:
      yield file
    os.replace(temporary, path)
  except BaseException:  # Ctrl-C too
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise


def size(path: str) -> int:
  """Bytes of the files in a folder."""
  return sum(os.path.getsize(os.path.join(folder, name))
             for folder, _, names in os.walk(path) for name in names)


def write_text(path: str, text: str) -> None:
  """Writes a UTF-8 text file."""
  with replacing(path) as file:
    file.write(text.encode())
