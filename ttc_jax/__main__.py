"""One entry for all commands: `ttc-jax COMMAND ...`, or `python -m ttc_jax`.

  ttc-jax train --config=demo              python -m ttc_jax.main ...
  ttc-jax predict --bundle=DIR IMAGE...    python -m ttc_jax.predict ...
  ttc-jax completion bash                  a script for the shell's completion

Every other name is the module that it runs; `ttc-jax COMMAND --help` explains.
"""
import runpy
import sys

COMMANDS = {
    "train": ("main", "trains what a configuration says, prints the tables"),
    "report": ("report", "tables, progress and evidence of work directories"),
    "predict": ("predict", "classes of images, from a bundle"),
    "tasks": ("tasks", "lists, prepares, checks and exports tasks"),
    "methods": ("methods", "lists the methods"),
    "weights": ("weights", "inspects, converts and compares weights"),
    "bundles": ("bundles", "inspects, packs and unpacks bundles"),
    "hub": ("hub", "uploads a bundle to the Hugging Face Hub"),
    "export": ("export", "writes a tuned model as other libraries load it"),
    "bench": ("bench", "times training and inference"),
}
_BASH = """_ttc_jax() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "{names}" -- "$word"))
  else
    COMPREPLY=($(compgen -f -W "{flags}" -- "$word"))
  fi
}}
complete -o filenames -F _ttc_jax ttc-jax
"""
_ZSH = "autoload -U bashcompinit && bashcompinit\n"
_FLAGS = ("--config= --workdir= --bundle= --weights= --data= --out= --to= "
          "--format= --help")


def completion(shell: str) -> str:
  """Returns the completion script of a shell, "bash" or "zsh"."""
  script = _BASH.format(names=" ".join([*COMMANDS, "completion"]),
                        flags=_FLAGS)
  return {"bash": "", "zsh": _ZSH}[shell] + script


def usage() -> str:
  """Returns the list of commands."""
  lines = [f"  {name:10}  {what}" for name, (_, what) in COMMANDS.items()]
  return "\n".join([
      "usage: ttc-jax COMMAND ...; ttc-jax COMMAND --help explains", *lines,
      f"  {'completion':10}  prints a completion script: bash or zsh"])


def main() -> None:
  """Runs the command that the arguments name."""
  name, *rest = sys.argv[1:] or ["--help"]
  if name in ("-h", "-help", "--help", "help"):
    print(usage())
    return
  if name == "--version":
    import ttc_jax
    print(f"ttc_jax {ttc_jax.__version__}")
    return
  if name == "completion" and rest in (["bash"], ["zsh"]):
    print(completion(rest[0]), end="")
    return
  if name == "completion":
    print("error: say ttc-jax completion bash, or zsh", file=sys.stderr)
    sys.exit(2)
  if name not in COMMANDS:
    print(f"error: unknown command {name!r}\n{usage()}", file=sys.stderr)
    sys.exit(2)
  sys.argv = [f"ttc-jax {name}", *rest]
  from ttc_jax import files, interrupt
  interrupt.starting()  # before the command's imports
  files.use_utf8_names()
  runpy.run_module(f"ttc_jax.{COMMANDS[name][0]}", run_name="__main__",
                   alter_sys=True)


if __name__ == "__main__":
  main()
