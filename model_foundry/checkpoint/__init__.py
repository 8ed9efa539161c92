"""Checkpoints that are complete or absent: atomic writes, manifests, schedules, retention, verification."""
