"""The messages between the supervisor and its children: one at a time (SOCK_SEQPACKET), the first byte says which.

    to the child        PROBE + errand, ENGINE + a descriptor, VISIT + a descriptor, POSTURE + JSON
    from the child      REPORT + results (`seal.probes`), ALIVE + seconds that the present step has taken,
                        MODEL + digest and key fingerprint of what the engine verified
"""

from __future__ import annotations

import struct
from typing import Final

PROBE, ENGINE, VISIT, POSTURE, REPORT, ALIVE, MODEL = (bytes([kind]) for kind in b"PEVSRAM")
LARGEST_MESSAGE: Final = 1 << 16
SECONDS: Final = struct.Struct(">I")
