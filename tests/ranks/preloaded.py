"""Loads the machine code that resizes images when it is imported: in the process that the workers
are copies of, or each of them would spend two seconds on it.
"""

from __future__ import annotations

from megavlm.data.images.decode import load_decoders

load_decoders()
