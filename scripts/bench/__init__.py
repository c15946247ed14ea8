"""Benchmarks of speed, memory and FLOPs on this machine; no other room imports them.

Each module with main(argv) is one benchmark. They share `turns`; `against` holds the implementations to compare with.
"""
