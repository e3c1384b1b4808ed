"""The stages of dvc.yaml, a thin script each around the library qvgen; `python -m stages.NAME` runs one by hand.

runtime/ is the frame that a stage runs in, record/ writes down what it did.
"""
