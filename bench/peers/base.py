"""What an adapter gives to the worker.

An adapter is a module adapters/NAME.py with
  LABEL                  how tables call it
  REQUIRES               what pip installs, pinned
  unsupported(problem)   why it cannot do the problem, or None; imports nothing heavy
  prepare(problem, data, threads) -> Side   everything that is not timed: conversion, cache, compilation
and, where it applies, ALONE (what pip installs without dependencies), install(build, pip, run) for what is
no package, and environment(threads) for settings that are made before the process starts.
"""
import dataclasses
import time
import typing


class Unsupported(Exception):
    """The library cannot do this problem; the text says why."""


@dataclasses.dataclass
class Side:
    version: str                # with the settings that were chosen
    run: typing.Callable        # what is timed
    output: typing.Callable     # numpy float array [batch, query_len, Hq, D] of the last run


def needs_same_type(problem):
    """For libraries whose keys and values have the type of the queries."""
    return None if problem.kv == problem.dtype else "keys and values in 8 bits are not offered"


def fastest(candidates):
    """(name, function) of the fastest of {name: function}; failing ones drop out. All have run then."""
    times, errors = {}, []
    for name, run in candidates.items():
        try:
            for _ in range(2 if len(candidates) > 1 else 1):
                start = time.perf_counter()
                run()
                times[name] = time.perf_counter() - start
                if times[name] > 1:  # s; the second run would not differ enough to matter
                    break
        except Exception as e:  # one way of several; the others decide
            times.pop(name, None)
            errors.append(f"{name}: {e}")
    if not times:
        raise Unsupported("; ".join(errors))
    best = min(times, key=times.get)
    return best, candidates[best]
