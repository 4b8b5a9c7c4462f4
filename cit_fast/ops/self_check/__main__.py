"""The process that checks and times kernels; see :mod:`cit_fast.ops.self_check.trial`."""

from __future__ import annotations

import sys

from cit_fast.ops.self_check.trial import main

main(sys.argv[1])
