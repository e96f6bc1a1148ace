"""Measurement: likelihoods over held-out text, and intervals over documents."""
