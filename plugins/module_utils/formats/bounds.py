# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Bounds that archives, splitstreams, file trees and EROFS images share: what one of them accepts, the next can hold.

A bound of one module only, such as the depth of directories, stands in that module.
"""

from __future__ import annotations

THRESHOLD = 64
"""Bytes: a regular file with more content than this has an object of its own; everything else lies within the stream
(splitstream, tar split rule).
"""
MAX_NAME = 255
"""Bytes of one component of a path, in EROFS and in the kernel (NAME_MAX)."""
MAX_SYMLINK = 4095
"""Bytes of the target of a symbolic link: one block less its terminator. EROFS cuts what is longer."""
MAX_XATTR = 65535
"""Bytes of the value of an extended attribute: the length field of EROFS has 16 bits."""
MAX_MAJOR, MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1
"""Device numbers are 12 and 20 bits in an inode."""
