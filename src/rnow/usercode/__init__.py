"""The processes in which a user's tools.py and rewards.py run, never the training process: docs/adr/0009.

``functions`` and ``host`` are this side of it. ``supervisor``, ``zygote``, ``worker`` and what they import run in the
children, are standard library only (with ``rnow.core``), and nothing is imported here so that they start fast.
"""
