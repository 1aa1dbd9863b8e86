# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What archives, splitstreams, file trees and EROFS images agree on, so that what one of them takes the next can hold.

Bounds that belong to one room only, such as how deep directories may lie, stand there.
"""

from __future__ import annotations

THRESHOLD = 64
"""Bytes: the content of a regular file that is longer lies in an object of its own, all else within the stream
(splitstream, tar split rule).
"""
MAX_NAME = 255
"""Bytes of one component of a path: EROFS, the kernel and every other file system agree on this one."""
MAX_SYMLINK = 4095
"""Bytes of the target of a symbolic link: one block less its terminator. EROFS cuts what is longer."""
MAX_XATTR = 65535
"""Bytes of the value of an extended attribute: the length field of EROFS has 16 bits."""
MAX_MAJOR, MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1
"""Device numbers are 12 and 20 bits in an inode."""
