"""What Xid errors of NVIDIA's driver mean for a GPU that serves.

By the immediate actions of NVIDIA's Xid catalog
(https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html) and the
notes on single errors beside it (https://docs.nvidia.com/deploy/xid-errors/).
Codes that are in no table here, such as 13, 31, 43, 45 and 68, are an
application's own or say too little: the readings show them, and nothing follows.
"""

from __future__ import annotations

from collections.abc import Mapping

CONTAINED_MEMORY_ERROR = 94
"""Of all codes in ``BROKEN``, the one after which it is enough that the engine starts again."""

BROKEN: Mapping[int, str] = {
    46: "the GPU stopped processing; reset it",
    48: "an uncorrectable memory error; reset the GPU",
    62: "its micro-controller halted; reset the GPU",
    64: "bad memory could not be written down for replacement; reset the GPU",
    74: "an NVLink error; reset the GPU and check its links",
    79: "the GPU has fallen off the bus; restart the host",
    94: "a contained memory error; restart the engine",
    95: "an uncontained memory error; reset the GPU",
    119: "its system processor does not answer; reset the GPU",
    120: "its system processor failed; reset the GPU",
    140: "a memory error that it did not recover from; reset the GPU",
    143: "the GPU could not be initialized; reset it",
}
"""Codes after which nothing that the GPU computes can be relied on, with what to do."""

DOUBTFUL: Mapping[int, str] = {
    63: "bad memory is replaced at the next reset; reset the GPU when there is time",
    92: "a high rate of corrected memory errors; have the GPU checked",
}
"""Codes that want somebody to look at the GPU, which works on."""
