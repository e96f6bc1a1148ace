"""Losses as pure functions of arrays: heads that stream, divergences, schedules and weights."""

from distil_jax.losses.head import HeadOutput, Teacher, distill, score

__all__ = ["HeadOutput", "Teacher", "distill", "score"]
