"""Training speed, beside the machine's matrix products and PyTorch's.

  programs.py   what is timed: forward pass, training epochs, matrix products
  timing.py     times programs in turns, and compares them with the ceiling
  pytorch.py    eager PyTorch doing the same training step
  __main__.py   the command
"""
