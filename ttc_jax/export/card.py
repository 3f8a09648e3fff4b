"""The model card of an export: a README.md as on the Hugging Face Hub."""
from collections.abc import Mapping
import json
import re
from typing import TYPE_CHECKING, Any

from ttc_jax import trees
from ttc_jax.errors import printable
from ttc_jax.methods import described
from ttc_jax.predict import LoadedModel
from ttc_jax.report import formats

if TYPE_CHECKING:
  from ttc_jax.export import Target

Meta = Mapping[str, Any]


def text(model: LoadedModel, target: "Target", code: str,
         how: Mapping[str, Any]) -> str:
  """Returns the card, Markdown.

  Args:
    code: the lines that load the files, from a PIL `image` to `logits`.
    how: as `export.preprocessing` returns it.
  """
  meta = model.meta
  sections = [
      front_matter(meta, target.hub_library, target.name),
      _heading(meta), _summary(model, target),
      "## Use", f"In the folder that holds this one:\n\n{_block(code)}",
      "## Results", _table(_results(meta)),
      "## Training", _table(_training(meta)),
      "## Tuned parameters", _table(_parameters(model)),
      "## Preprocessing", _preprocessing(how),
      "## Limits", _limits(meta, target)]
  return "\n\n".join(sections) + "\n"


def of_bundle(meta: Meta, address: str) -> str:
  """Returns the card of a bundle on the Hub, Markdown.

  Args:
    address: hf://owner/name.
  """
  source, what = described(meta["method"])
  weights = meta["weights_source"]
  if "://" not in weights:  # no folders of the user's machine
    weights = weights.rpartition("/")[2]
  code = (f'import ttc_jax\ntuned = ttc_jax.predict.load("{address}", '
          f'weights={json.dumps(weights)})\n'
          'probabilities = tuned.predict(["image.png"])')
  sections = [
      front_matter(meta, "ttc_jax"), _heading(meta),
      f"What `ttc_jax` tuned with the method `{meta['method']}` ({source}: "
      f"{what.rstrip('.')}): leaves to put on the base weights, which are not "
      f"here (sha256 {meta['weights_sha256']}).",
      "## Use", f"```python\n{code}\n```",
      "## Results", _table(_results(meta)),
      "## Training", _table(_training(meta))]
  return "\n\n".join(sections) + "\n"


def _name(meta):
  return f"{meta['backbone']}, {meta['method']} on {meta['task']}"


def _heading(meta):
  return formats.in_markdown(f"# {_name(meta)}")


def _accuracy(meta):
  """(percent, split), None if the run measured neither."""
  for key, split in (("test_top1", "test"), ("val_top1", "val")):
    if meta.get(key) is not None:
      return meta[key], split
  return None


def front_matter(meta: Meta, library: str, *tags: str) -> str:
  """Returns the Hub's metadata: YAML, as JSON values, which YAML contains."""
  dataset = {"name": meta["task"], "type": meta["task"]}
  results = [{"task": {"type": "image-classification"}, "dataset": dataset,
              "metrics": [{"type": "accuracy", "value": round(a / 100, 4),
                           "name": f"top-1, {split}"}]}
             for a, split in filter(None, [_accuracy(meta)])]
  fields = {
      "library_name": library,
      "pipeline_tag": "image-classification",
      "tags": ["image-classification", "parameter-efficient-fine-tuning",
               meta["method"], meta["backbone"], *tags],
      "metrics": ["accuracy"],
      "model-index": [{"name": printable(_name(meta)), "results": results}]}
  if hub := re.match(r"hf://([^/]+/[^/#@]+)", meta.get("weights_source", "")):
    fields["base_model"] = hub[1]
  lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
  return "\n".join(["---", *lines, "---"])


def _summary(model, target):
  meta = model.meta
  source, what = described(meta["method"])
  merged = (
      "The method's adapter is part of the exported computation, since it "
      f"cannot be merged: {model.cannot_merge}." if model.cannot_merge else
      "All tuned parameters are merged into the weights: the model has the "
      "shape and the cost of its backbone.")
  return (f"An image classifier of {len(meta['classes'])} classes, tuned by "
          f"`ttc_jax` with the method `{meta['method']}` ({source}: "
          f"{what.rstrip('.')}), and exported for `{target.name}`. {merged}")


def _block(code):
  return ('```python\nfrom PIL import Image\n'
          'image = Image.open("image.png").convert("RGB")\n'
          f'{code.strip()}\n```')


def _results(meta):
  accuracy = _accuracy(meta)
  rows = {"task": f"{meta['task']} ({meta['group']})"
          if meta.get("group") else meta["task"]}
  if accuracy:
    rows["top-1 accuracy"] = f"{accuracy[0]:.2f} % of {accuracy[1]}"
  return rows | _some(meta, test_count="test images", seed="seed") | {
      "classes": ", ".join(meta["classes"])}


def _training(meta):
  protocols = {
      "final": "final: trained on train and val, the test set used once",
      "val": "val: trained on train, val reported"}
  protocol = meta.get("protocol")
  rows = {"protocol": protocols.get(protocol, protocol)} if protocol else {}
  rows |= _some(
      meta, train_count="training images", data_digest="digest of the data",
      optimiser="optimiser", lr="learning rate", weight_decay="weight decay",
      batch_size="batch size", epochs="epochs a stage",
      warmup_epochs="warm-up epochs", drop_path="drop path",
      label_smoothing="label smoothing", dtype="computed in",
      frozen_dtype="frozen kernels kept in",
      matmul_precision="matrix products", device="device",
      weights="base weights", weights_sha256="sha256 of the base weights")
  rows["stages"] = ", ".join(meta.get("stages") or ()) or "one"
  rows["options of the method"] = _code(meta["options"])
  rows["versions"] = ", ".join(
      f"{name} {version}"
      for name, version in (meta.get("versions") or {}).items())
  return rows


def _some(meta, **titles):
  """{title: value} of the keys that the bundle has."""
  return {title: meta[key] for key, title in titles.items()
          if meta.get(key) is not None}


def _code(value):
  # "<" would be escaped as Markdown, and a backslash shows within backticks.
  text_ = json.dumps(value).replace("<", "\\u003c")
  return f"`{text_}`" if value else "none"


def _parameters(model):
  rows = {part: f"{model.meta[f'{part}_params']:,}"
          for part in ("module", "norm", "head")
          if model.meta.get(f"{part}_params") is not None}
  return rows | {"of the exported model": f"{trees.count(model.params):,}"}


def _table(rows):
  return formats.pipes([("", ""), *((title, str(value).replace("\n", " "))
                                    for title, value in rows.items())],
                       aligned=False)


def _preprocessing(how):
  filtered, _, short = how["resample"].partition("/")
  return (f"RGB, resized to {how['size']} x {how['size']} pixels "
          f"({filtered}, antialiased, " + (
              f"the short side to {short} and the centre cropped" if short
              else "the aspect ratio not kept") + "), then "
          f"(x / 255 - mean) / std with mean {how['mean']} and std "
          f"{how['std']}. `ttc_jax` lays transparency over white; the lines "
          "above drop it.")


def _limits(meta, target):
  lines = [
      "One run with one seed: its accuracy is not a mean.",
      "Measured on the test images named above alone; other images, another "
      "resampling or size may give another accuracy.",
      "The licences of the base weights and of the data apply."]
  if meta["dtype"] != "float32":
    lines.append(f"Trained and tested in {meta['dtype']}, exported in float32.")
  if (meta.get("frozen_dtype") or "float32") != "float32":
    lines.append(f"Trained and tested with kernels kept in "
                 f"{meta['frozen_dtype']}; exported with the same values.")
  lines += target.limits
  if meta.get("protocol") == "val":
    lines.append("The test set was not used: the accuracy is that of val.")
  return "\n".join(f"- {line}" for line in lines)
