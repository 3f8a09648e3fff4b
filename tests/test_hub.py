"""Bundles on the Hub, with a stand-in for its client: no network."""
import json
import os
import shutil
import sys
import types

import numpy as np
import pytest

from tests import made_bundles
from ttc_jax import bundles, hub
from ttc_jax.errors import UserError


class Refused(OSError):
  pass


class Away(Refused):
  pass


@pytest.fixture
def client(monkeypatch, tmp_path):
  """A Hub of folders: huggingface_hub's calls that we make."""
  root = tmp_path / "hub"
  made = types.ModuleType("huggingface_hub")
  made.errors = types.SimpleNamespace(
      HfHubHTTPError=Refused, EntryNotFoundError=Refused,
      LocalEntryNotFoundError=Away)
  made.private = {}

  class HfApi:
    def create_repo(self, repo, private, exist_ok):
      if repo.startswith("closed/"):
        raise Refused("401 Client Error: you may not write here")
      (root / repo).mkdir(parents=True, exist_ok=exist_ok)
      made.private[repo] = private

    def upload_folder(self, repo_id, folder_path, commit_message):
      shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def list_repo_files(self, repo, revision):
      return os.listdir(root / repo)

  def hf_hub_download(repo, file, revision, cache_dir):
    path = root / repo / file
    if not path.exists():
      raise Refused("404")
    return str(path)
  made.HfApi, made.hf_hub_download, made.root = HfApi, hf_hub_download, root
  monkeypatch.setitem(sys.modules, "huggingface_hub", made)
  return made


@pytest.fixture
def saved(tmp_path):
  base = made_bundles.save_base(str(tmp_path / "w.safetensors"), "vit_ti8")
  bundles.save(str(tmp_path / "bundle"), made_bundles.make(base))
  return str(tmp_path / "bundle")


def test_pushed_and_loaded_it_is_the_same(client, saved):
  url = hub.push(saved, "hf://me/pets", private=True)
  assert url == "https://huggingface.co/me/pets"
  assert client.private == {"me/pets": True}
  before, after = bundles.load(saved), bundles.load("hf://me/pets")
  # The folder of the weights is of this machine.
  assert after.meta == before.meta | {"weights_source": "w.safetensors"}
  assert os.path.isabs(before.meta["weights_source"])
  for part in ("tuned", "buffers"):
    one, other = getattr(before, part), getattr(after, part)
    assert one.keys() == other.keys()
    for name, x in one.items():
      np.testing.assert_array_equal(x, other[name])


def test_without_a_network_it_is_one_sentence(client, saved, monkeypatch):
  class Unreachable(Exception):  # of the client's own
    pass

  def refuse(*args, **more):
    raise Unreachable("Name or service\nnot known")
  monkeypatch.setattr(client.HfApi, "create_repo", refuse)
  with pytest.raises(UserError, match=(
      r"hf://me/pets was not written \(Unreachable: Name or service not known"
      r"\): check that this machine reaches")):
    hub.push(saved, "hf://me/pets")


def test_the_card_says_how_to_load_it_and_no_folder_of_ours(client, saved):
  hub.push(saved, "hf://me/pets")
  text = (client.root / "me/pets/README.md").read_text()
  front = text.split("---")[1]
  fields = dict(line.split(": ", 1) for line in front.strip().splitlines())
  assert json.loads(fields["library_name"]) == "ttc_jax"
  assert 'predict.load("hf://me/pets", weights="w.safetensors")' in text
  assert os.path.dirname(saved) not in text


@pytest.mark.parametrize("address", ["me/pets", "hf://pets", "hf://a/b/c",
                                     "https://huggingface.co/me/pets"])
def test_other_addresses_are_refused(client, saved, address):
  with pytest.raises(UserError, match="is no hf://owner/name"):
    hub.push(saved, address)


def test_a_refusal_is_one_sentence_with_the_way_to_log_in(client, saved):
  with pytest.raises(UserError, match="401.*hf auth login"):
    hub.push(saved, "hf://closed/pets")


def test_without_the_library_the_extra_is_named(saved, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(UserError, match=r"\.\[hub\]"):
    hub.push(saved, "hf://me/pets")
