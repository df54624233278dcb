"""io_uring by bare system calls, so that no library for it is needed: accept and connect without the calls of these names."""

import ctypes
import mmap
import os
import struct

from common import LIBC, call, check


class Uring:
    """One operation at a time."""

    SETUP, ENTER = 425, 426
    ACCEPT, CONNECT, SEND, RECV = 13, 16, 26, 27
    GETEVENTS = 1

    def __init__(self):
        params = ctypes.create_string_buffer(120)
        self.fd = call(LIBC.syscall, self.SETUP, 4, ctypes.byref(params))
        if self.fd < 0:
            raise OSError(-self.fd, os.strerror(-self.fd))
        entries, completions = struct.unpack_from("=II", params, 0)
        _, self.sq_tail, self.sq_mask, _, _, _, self.sq_array = struct.unpack_from("=7I", params, 40)
        self.cq_head, _, self.cq_mask, _, _, self.cqes = struct.unpack_from("=6I", params, 80)
        self.sq = mmap.mmap(self.fd, self.sq_array + entries * 4, offset=0)
        self.cq = mmap.mmap(self.fd, self.cqes + completions * 16, offset=0x8000000)
        self.sqes = mmap.mmap(self.fd, entries * 64, offset=0x10000000)

    def do(self, opcode, fd, address=0, length=0, offset=0, flags=0):
        """Submits one operation and waits for its result."""
        tail, = struct.unpack_from("=I", self.sq, self.sq_tail)
        index = tail & struct.unpack_from("=I", self.sq, self.sq_mask)[0]
        entry = struct.pack("=BBHiQQII", opcode, 0, 0, fd, offset, address, length, flags)
        self.sqes[index * 64:index * 64 + 64] = entry.ljust(64, b"\0")
        struct.pack_into("=I", self.sq, self.sq_array + index * 4, index)
        struct.pack_into("=I", self.sq, self.sq_tail, tail + 1)
        done = call(LIBC.syscall, self.ENTER, self.fd, 1, 1, self.GETEVENTS, None, 0)
        check(done == 1, "io_uring_enter:", done)
        head, = struct.unpack_from("=I", self.cq, self.cq_head)
        index = head & struct.unpack_from("=I", self.cq, self.cq_mask)[0]
        _, result, _ = struct.unpack_from("=QiI", self.cq, self.cqes + index * 16)
        struct.pack_into("=I", self.cq, self.cq_head, head + 1)
        return result

    def recv(self, fd, size=65_536):
        buffer = ctypes.create_string_buffer(size)
        count = self.do(self.RECV, fd, ctypes.addressof(buffer), size)
        check(count >= 0, "io_uring recv:", count)
        return buffer.raw[:count]

    def send_all(self, fd, data):
        buffer, sent = ctypes.create_string_buffer(data, len(data)), 0
        while sent < len(data):
            count = self.do(self.SEND, fd, ctypes.addressof(buffer) + sent, len(data) - sent)
            check(count > 0, "io_uring send:", count)
            sent += count
