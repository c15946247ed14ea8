"""Measurements of models, during training and of checkpoints.

A module with `measure_run` is a complete measurement: `Settings` are the options of `steppe NAME`, `TITLES` its table,
`draw` its figures. Its numbers go to WORKDIR/NAME/STEP.json and into a section of every report.
"""
