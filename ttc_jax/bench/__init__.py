"""Training speed, beside the machine's matrix products and PyTorch's.

  programs.py   what is timed: forward pass, training epochs, matrix products
  timing.py     times programs in turns, and compares them with the ceiling
  pipeline.py   reads a training set that streams, alone and with the step
  memory.py     the largest batch of a device, from compiled programs
  pytorch.py    PyTorch doing the same training step, eager and compiled
  text.py       what is printed of a measurement
  suite.py      all shapes in both types; bench.json and its table
  __main__.py   the command
"""
