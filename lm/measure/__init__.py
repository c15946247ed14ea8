"""What is measured of models, in training and of checkpoints.

A module with `measure_run` is a measurement, and the only file of it: `Settings` are the options of `steppe NAME`,
`TITLES` its table, `draw` its figures. Its numbers are WORKDIR/NAME/STEP.json, and a section of every report.
"""
