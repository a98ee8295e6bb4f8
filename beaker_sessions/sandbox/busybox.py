"""Which BusyBox sessions get: a static one, which runs in any image.

The distribution's, unless set-up had to fetch one beside it (`setup.packages`), as there may be a dynamic one, which
the initramfs is made of.
"""

from __future__ import annotations

import os

OURS = "/opt/beaker-sessions/busybox"
BUSYBOX = OURS if os.path.exists(OURS) else "/bin/busybox"
