"""The command line: for task, for variant, for seed: one run, one row.

  python -m ttc_jax.main --config=configs/demo.py
  python -m ttc_jax.main --workdir=DIR --config=configs/vtab.py:\
task=caltech101,method=ttc,backbone=vit_b16,data=DIR,weights=FILE
"""
from absl import flags

from ttc_jax import cli, interrupt
from ttc_jax.errors import UserError

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where results go; default: a folder of checkpoints/runs "
    "named after the configuration")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of several hosts, where JAX "
    "does not know the cluster")
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "how many processes there are, with --coordinator")
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "which of them this is, from 0")


def main(argv: list[str]) -> int:
  """Runs a session and prints its tables; 1 if a task or run is missing."""
  if argv[1:]:
    raise UserError(f"unexpected argument {argv[1]!r}; after --config=FILE: "
                    "there must be no blanks")
  interrupt.starting()  # an exception inside an import would be any other's
  from ttc_jax import launch  # JAX and all else, which --help does not need
  interrupt.ending()
  return launch.run(
      _CONFIG.value, cli.config_filename(), _WORKDIR.value,
      (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main)
