"""What the finished experiments say about the paper: claims, then a page.

  claims.py  each claim of the paper, and how it is judged from rows
  page.py    the claims, tables and figures as one HTML file or Markdown

`python -m ttc_jax.report paper WORKDIR...` writes it.
"""
