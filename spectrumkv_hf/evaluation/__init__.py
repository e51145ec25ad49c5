"""Measurements of what a compressed KV cache costs, and of others beside it under the same protocol.

`subjects` are what is measured (methods, models, texts), `metrics` which numbers come of it (modules of `evaluate`),
`protocols` how, `report` keeps and shows it (cells on disk, tables, figures), and `experiments` ask one question each.
Imports go down this list from its end. Only drawing needs matplotlib.
"""
