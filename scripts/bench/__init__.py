"""Measurements of speed, memory and FLOPs on this machine, side by side in one process; nothing else imports them.

A module with main(argv) is a kind of bench; `turns` is what they share, `against` what they measure Steppe against.
"""
