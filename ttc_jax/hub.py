"""Bundles on the Hugging Face Hub.

  python -m ttc_jax.hub push BUNDLE hf://owner/name [--private]

makes the repository if need be and uploads the packed bundle with its model
card. `ttc_jax.predict.load("hf://owner/name", weights=...)` opens it, as does
every command that takes a bundle. The token is the Hub's own: `hf auth login`,
or HF_TOKEN.
"""
import os
import re
import tempfile

from absl import flags

from ttc_jax import bundles, cli, files
from ttc_jax.errors import UserError
from ttc_jax.export import card

FILE = "bundle.safetensors"


def push(bundle: str, address: str, private: bool = False) -> str:
  """Uploads a bundle with its card; returns the page's address.

  Args:
    bundle: the folder that a run wrote, or a packed file.
    address: hf://owner/name; the repository is made if it does not exist.
    private: of a new repository.

  Raises:
    UserError: no bundle, no such address, or the Hub refuses.
  """
  match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)", address)
  if not match:
    raise UserError(f"'{address}' is no hf://owner/name")
  saved = bundles.load(bundle)
  saved = saved._replace(meta=bundles.published(saved.meta))
  try:
    import huggingface_hub as hub
  except ImportError as e:
    raise UserError("the Hub needs huggingface_hub: pip install -e '.[hub]'"
                    ) from e
  with tempfile.TemporaryDirectory() as folder:
    bundles.pack(os.path.join(folder, FILE), saved)
    files.write_text(os.path.join(folder, "README.md"),
                     card.of_bundle(saved.meta, address))
    api = hub.HfApi()
    try:
      api.create_repo(match[1], private=private, exist_ok=True)
      api.upload_folder(repo_id=match[1], folder_path=folder,
                        commit_message="Bundle of ttc_jax")
    except Exception as e:  # the library and its client have their own
      reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
      raise UserError(
          f"{address} was not written ({reason}): check that this machine "
          "reaches huggingface.co, and log in with `hf auth login`, or set "
          "HF_TOKEN") from e
  return f"https://huggingface.co/{match[1]}"


def main(argv: list[str]) -> None:
  if len(argv) != 4 or argv[1] != "push":
    raise UserError("say push BUNDLE hf://owner/name")
  print(push(argv[2], argv[3], _PRIVATE.value))


if __name__ == "__main__":
  _PRIVATE = flags.DEFINE_bool("private", False, "a new repository is private")
  cli.run(main)
