"""`detach PIN` takes a kernel program's link off what it hangs on, as anybody with the rights can: the pin stays."""

import ctypes
import os
import sys

BPF, OBJ_GET, LINK_DETACH = 321, 7, 34
libc = ctypes.CDLL(None, use_errno=True)


class Get(ctypes.Structure):
    _fields_ = [("pathname", ctypes.c_uint64), ("bpf_fd", ctypes.c_uint32), ("file_flags", ctypes.c_uint32)]


class Detach(ctypes.Structure):
    _fields_ = [("link_fd", ctypes.c_uint32)]


def bpf(command, attributes):
    result = libc.syscall(BPF, command, ctypes.byref(attributes), ctypes.sizeof(attributes))
    if result < 0:
        sys.exit(f"bpf({command}): {os.strerror(ctypes.get_errno())}")
    return result


path = ctypes.create_string_buffer(sys.argv[1].encode())
bpf(LINK_DETACH, Detach(bpf(OBJ_GET, Get(ctypes.addressof(path), 0, 0))))
