"""Configuration files, and values set on the command line.

  --config=FILE[:key=value,...]   runs get_config("key=value,...") of FILE
  --config=NAME[:key=value,...]   the same of a file that comes with the package
  --config.KEY=VALUE              then sets a key

Every mistake is one sentence that names the file and the line.
"""
import ast
import math
import os
import re
import traceback
import types
from typing import Any

import ml_collections

from ttc_jax.config import default
from ttc_jax.errors import UserError, check_known


def split(argument: str) -> tuple[str, str | None]:
  """Splits "FILE:key=value,..." into the file and its argument, or None.

  The file's path may have colons: the longest one that exists wins. "demo" is
  a file that comes with the package where there is no file of that name.

  Raises:
    UserError: no such file.
  """
  ends = [len(argument)] + [i for i in reversed(range(len(argument)))
                            if argument[i] == ":"]
  for end in ends:
    if os.path.isfile(argument[:end]):
      return argument[:end], argument[end + 1:] if argument[end:] else None
  name, colon, rest = argument.partition(":")
  if name in packaged():
    return os.path.join(_PACKAGED, f"{name}.py"), rest if colon else None
  raise UserError(f"configuration '{name}' does not exist; give "
                  "--config=FILE[:key=value,...], or one of "
                  f"{', '.join(packaged())}")


_PACKAGED = os.path.join(os.path.dirname(__file__), "configs")


def packaged() -> list[str]:
  """Returns the names of the configurations that come with the package."""
  return sorted(file[:-3] for file in os.listdir(_PACKAGED)
                if file.endswith(".py"))


def load(file: str, argument: str | None) -> ml_collections.ConfigDict:
  """Returns `get_config(argument)` of a configuration file.

  Args:
    file: Python file with `get_config(arg=None)`.
    argument: None calls it without an argument.

  Raises:
    UserError: the file cannot be read or run, or what it returns lacks keys of
      `config.default` or has others.
  """
  try:
    with open(file, "rb") as f:
      code = compile(f.read(), file, "exec")
    module = types.ModuleType("config")
    module.__file__ = file
    exec(code, vars(module))
    if not hasattr(module, "get_config"):
      raise UserError(f"configuration '{file}' has no function get_config(arg)")
    given = () if argument is None else (argument,)
    config = module.get_config(*given)
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    raise UserError(f"configuration '{file}'{_line(error, file)}: "
                    f"{_reason(error)}") from error
  _check_keys(file, config)
  return config


def _line(error, file):
  """Returns ", line N", the last line of the file that was run."""
  if isinstance(error, SyntaxError) and error.filename == file:
    return f", line {error.lineno}"
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if frame.filename == file]
  return f", line {lines[-1]}" if lines else ""


def _reason(error):
  text = error.msg if isinstance(error, SyntaxError) else error
  while isinstance(text, (AttributeError, KeyError)) and text.args:
    text = text.args[0]  # a KeyError's text is in quotes; ConfigDict nests two
  # ml_collections lists all keys.
  text = re.sub(r"Other fields present: .*?(Did you mean|$)", r"\1", str(text),
                flags=re.DOTALL)
  return f"{type(error).__name__}: {' '.join(text.split())}"


def _check_keys(file, config):
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"configuration '{file}': get_config returned "
                    f"{type(config).__name__}; return the ConfigDict of "
                    "ttc_jax.config.default() with your values")
  known = default()
  for key in config:
    check_known(f"key of configuration '{file}'", key, known)
  for key in known:
    if key not in config:
      raise UserError(f"configuration '{file}' has no key '{key}': start from "
                      "ttc_jax.config.default()")


# --- Single values ------------------------------------------------------------

def is_switch(path: str) -> bool:
  """Returns True if `--config.PATH` alone means True."""
  value: Any = default()
  for key in _split(path)[1]:
    value = value[key] if hasattr(value, "keys") and key in value else None
  return isinstance(value, bool)


def override(config: ml_collections.ConfigDict, path: str, text: str) -> None:
  """Sets a key to the value that a text says, in the type of that key.

    override(config, "lr", "1e-3")
    override(config, "per_task.dtd.sct.scale_on_x", "true")
    override(config, "warmup_epochs", "None")

  Args:
    path: a key, "section.key", "per_task.TASK.KEY" or "variants.LABEL.KEY".
    text: what stands after the equals sign. Tuples: "1,2", "(1, 2)", "[1, 2]".

  Raises:
    UserError: an unknown key or a value of another type.
  """
  overlay, keys = _split(path)
  if overlay[:1] == ["variants"]:
    check_known("variant", overlay[1], config.variants)
  where, like = ".".join(["config", *overlay]), default()
  for key in keys:
    if not isinstance(like, ml_collections.ConfigDict):
      raise UserError(f"config.{path}: {where} has no keys of its own")
    check_known(f"key of {where}", key, like)
    like, where = like[key], f"{where}.{key}"
  if isinstance(like, ml_collections.ConfigDict):
    raise UserError(f"{where} is a section: set one of its keys, as "
                    f"--{where}.KEY=VALUE")
  _set(config, [*overlay, *keys], _parse(where, text, like))


def _split(path):
  """Splits off the leading "per_task.TASK", "variants.LABEL" or both."""
  keys, end = path.split("."), 0
  for name in ("variants", "per_task"):
    if keys[end] == name and len(keys) > end + 2:
      end += 2
  return keys[:end], keys[end:]


def _set(config, keys, value):
  with config.unlocked():
    for key in keys[:-1]:
      if key not in config:
        config[key] = ml_collections.ConfigDict()
      config = config[key]
    config[keys[-1]] = value


def _parse(name, text, like):
  """Converts a text to the type of a default; None where that is None."""
  if text == "None" and like is None:
    return None
  if isinstance(like, bool):
    if text.lower() not in _BOOLS:
      raise UserError(f"{name}={text}: give true or false")
    return _BOOLS[text.lower()]
  if isinstance(like, tuple):
    return _tuple(name, text, like)
  kind = float if like is None else type(like)  # of a placeholder
  try:
    value = kind(text)
  except ValueError as error:
    raise UserError(f"{name}={text}: give {_KINDS[kind]}") from error
  if kind is float and not math.isfinite(value):
    raise UserError(f"{name}={text}: give a finite number")
  return value


_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_KINDS = {int: "an integer, as 3", float: "one number, as 1e-3"}


def _tuple(name, text, like):
  """Converts "1,2", "(1, 2)" or "[1, 2]"; strings need no quotes."""
  strings = bool(like) and isinstance(like[0], str)
  value: Any = text
  if text.startswith(("(", "[")):
    try:
      value = ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
      raise UserError(f"{name}={text}: give values with commas between them, "
                      "as a,b") from error
  if isinstance(value, str):
    pieces = [piece.strip() for piece in value.split(",")]
    pieces = pieces[:-1] if len(pieces) > 1 and not pieces[-1] else pieces
    value = pieces if strings else [_number(p) for p in pieces if p]
  value = value if isinstance(value, (tuple, list)) else (value,)
  return tuple(map(str, value)) if strings else tuple(value)


def _number(text):
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      continue
  return text  # `config.check` says what is wrong
