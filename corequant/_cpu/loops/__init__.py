"""Loops compiled by numba: no checks, no allocation of results, no knowledge of specs.

A kernel reads like its definition. It takes the range of rows to work on, so that the caller
decides about threads, and contiguous arrays that the caller has checked.
"""
