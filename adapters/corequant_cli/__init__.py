"""The ``corequant`` command: arguments in, calls to corequant_transformers, tables out."""
