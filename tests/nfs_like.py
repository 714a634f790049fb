"""A filesystem with the caches of an NFS client: `nfs_like.py BEHIND POINT SECONDS HOST`.

Two of these over one folder are two clients of one export. Each shows BEHIND at POINT, in a mount
namespace of its own and under a host name of its own, and prints `ready`. For SECONDS it does not
ask again about names that it knows, names that it knows to be missing, sizes and times of files,
and listings. As an NFS client does, it asks at `open`, and by O_EXCL; it knows its own changes at
once; and times have whole seconds. Files that another client removed are stale.

Names that were missing are remembered here, and not by the kernel: once a client has changed a
folder, it asks anew for what it remembers of the folder, as an NFS client does.

FUSE's protocol (linux/fuse.h) is spoken here, as no library for Python tells the kernel to forget
a file's size when the file is opened.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

NEWNS, NEWUTS = 0x20000, 0x4000000
REC_PRIVATE = 0x44000
ROOT = 1
ATTR = struct.Struct("<6Q10I")
HEADER, ANSWER = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
READ = WRITE = struct.Struct("<QQIIQII")
SETATTR = struct.Struct("<IIQQQQQQIIIIIIII")
MODE, SIZE, ATIME, MTIME, ATIME_NOW, MTIME_NOW = 1, 8, 16, 32, 128, 256
DIRECT_IO, KEEP_CACHE, CACHE_DIR = 1, 2, 8
AUTO_INVAL_DATA, BIG_WRITES = 1 << 12, 1 << 5
GRANULARITY = 10**9
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(point: str, host: str) -> int:
    """Mount in namespaces of this process's own; returns the kernel's end.

    Raises:
        OSError: this process may not, or there is no FUSE.
    """
    fuse = os.open("/dev/fuse", os.O_RDWR)
    _call("unshare", NEWNS | NEWUTS)
    _call("mount", b"none", b"/", None, REC_PRIVATE, None)
    socket.sethostname(host)
    options = f"fd={fuse},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    _call("mount", b"nfs-like", point.encode(), b"fuse", 0, options.encode())
    return fuse


class Client:
    """Answers the kernel's questions, one after the other.

    A node is known by a descriptor, so that its inode's number is not used again. Its count is that
    of the kernel's lookups.
    """

    def __init__(self, behind: str, fuse: int, seconds: float) -> None:
        self._fuse = fuse
        self._seconds, self._valid = seconds, (int(seconds), int(seconds % 1 * 1e9))
        self._missing: dict[int, dict[str, float]] = {}
        self._folders: dict[int, tuple[float, bytes]] = {}
        self._nodes = {ROOT: [os.open(behind, os.O_PATH), 1]}
        self._numbers = {self._key(os.stat(behind)): ROOT}
        self._last = ROOT
        self._listings: dict[int, list[tuple[str, int, int]]] = {}
        self._does: dict[int, Callable[[int, bytes], bytes | None]] = {
            1: lambda node, name: self._entry(node, _name(name)),
            2: lambda node, body: self._forget(node, *struct.unpack("<Q", body)),
            3: self._getattr,
            4: self._setattr,
            8: lambda node, body: self._made(node, body[16:], self._mknod, body),
            9: lambda node, body: self._made(node, body[8:], self._mkdir, body),
            10: lambda node, name: self._remove(os.unlink, node, name),
            11: lambda node, name: self._remove(os.rmdir, node, name),
            12: lambda node, body: self._rename(node, body, 8),
            13: self._link,
            14: self._open,
            15: self._read,
            16: self._write,
            17: self._statfs,
            18: lambda node, body: self._done(os.close, _handle(body)),
            20: lambda node, body: self._done(os.fsync, _handle(body)),
            25: lambda node, body: b"",
            26: self._init,
            27: self._opendir,
            28: self._readdir,
            29: lambda node, body: self._done(self._listings.pop, _handle(body)),
            30: lambda node, body: self._done(os.sync),
            35: self._create,
            42: self._forget_many,
            45: lambda node, body: self._rename(node, body, 16),
        }

    def serve(self) -> None:
        """Answer until the filesystem is gone."""
        while True:
            try:
                asked = os.read(self._fuse, (1 << 20) + 4096)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EAGAIN):
                    continue
                return
            _, what, unique, node, *_ = HEADER.unpack_from(asked)
            number, answer = 0, b""
            try:
                done = self._does[what](node, asked[HEADER.size :])
                if done is None:
                    continue
                answer = done
            except KeyError:
                number = errno.ENOSYS if what not in self._does else errno.ESTALE
            except OSError as error:
                number = error.errno or errno.EIO
            self._say(-number, unique, answer)

    def _say(self, number: int, unique: int, answer: bytes) -> None:
        # Who asked may have been killed, and the kernel may not know a node any more.
        with suppress(FileNotFoundError):
            os.write(self._fuse, ANSWER.pack(ANSWER.size + len(answer), number, unique) + answer)

    def _init(self, _: int, body: bytes) -> bytes:
        flags = struct.unpack_from("<4I", body)[3] & (AUTO_INVAL_DATA | BIG_WRITES)
        return struct.pack("<4I2H2I2H8I", 7, 31, 65536, flags, 16, 12, 1 << 17, GRANULARITY, 0, 0,
                           *[0] * 8)  # fmt: skip

    @staticmethod
    def _key(found: os.stat_result) -> tuple[int, int]:
        return found.st_dev, found.st_ino

    def _fd(self, node: int) -> int:
        return int(self._nodes[node][0])

    def _path(self, node: int) -> str:
        """The node's path, by its descriptor; raises for a file that is removed."""
        fd = self._fd(node)
        if not os.fstat(fd).st_nlink:
            raise OSError(errno.ESTALE, "stale")
        return f"/proc/self/fd/{fd}"

    def _entry(self, parent: int, name: str) -> bytes:
        """Look a name up; a missing one is remembered as well."""
        missing, now = self._missing.setdefault(parent, {}), time.monotonic()
        if missing.get(name, 0.0) > now:
            return bytes(128)
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._fd(parent))
        except FileNotFoundError:
            self._path(parent)
            missing[name] = now + self._seconds
            return bytes(128)
        found = os.fstat(fd)
        node = self._numbers.get(self._key(found))
        if node is None:
            self._last = node = self._last + 1
            self._nodes[node], self._numbers[self._key(found)] = [fd, 0], node
        else:
            os.close(fd)
        self._nodes[node][1] += 1
        whole, rest = self._valid
        return struct.pack("<4Q2I", node, 0, whole, whole, rest, rest) + _attributes(found)

    def _forget(self, node: int, count: int) -> None:
        known = self._nodes[node]
        known[1] -= count
        if known[1] <= 0 and node != ROOT:
            del self._numbers[self._key(os.fstat(known[0]))], self._nodes[node]
            self._changed(node)
            os.close(known[0])

    def _forget_many(self, _: int, body: bytes) -> None:
        for node, count in struct.iter_unpack("<QQ", body[8:]):
            self._forget(node, count)

    def _shown(self, found: os.stat_result) -> bytes:
        return struct.pack("<Q2I", *self._valid, 0) + _attributes(found)

    def _getattr(self, node: int, body: bytes) -> bytes:
        """A folder's attributes are remembered here, too: the kernel asks after each listing."""
        flags, _, handle = struct.unpack_from("<IIQ", body)
        until, answer = self._folders.get(node, (0.0, b""))
        if time.monotonic() < until:
            return answer
        found = os.stat(handle if flags & 1 else self._path(node))
        if stat.S_ISDIR(found.st_mode):
            self._folders[node] = time.monotonic() + self._seconds, self._shown(found)
        return self._shown(found)

    def _setattr(self, node: int, body: bytes) -> bytes:
        what, _, _, size, _, atime, mtime, _, ansec, mnsec, _, mode, *_ = SETATTR.unpack_from(body)
        path = self._path(node)
        self._changed(node)
        if what & MODE:
            os.chmod(path, stat.S_IMODE(mode))
        if what & SIZE:
            os.truncate(path, size)
        if what & (ATIME_NOW | MTIME_NOW):
            os.utime(path)
        elif what & (ATIME | MTIME):
            os.utime(path, ns=(atime * 10**9 + ansec, mtime * 10**9 + mnsec))
        return self._shown(os.stat(path))

    def _made(self, node: int, name: bytes, make: Callable[..., None], body: bytes) -> bytes:
        make(node, _name(name), body)
        self._changed(node)
        return self._entry(node, _name(name))

    def _changed(self, *folders: int) -> None:
        for folder in folders:
            self._missing.pop(folder, None)
            self._folders.pop(folder, None)

    def _mknod(self, node: int, name: str, body: bytes) -> None:
        os.mknod(name, struct.unpack_from("<I", body)[0], dir_fd=self._fd(node))

    def _mkdir(self, node: int, name: str, body: bytes) -> None:
        os.mkdir(name, struct.unpack_from("<I", body)[0], dir_fd=self._fd(node))

    def _remove(self, remove: Callable[..., None], node: int, name: bytes) -> bytes:
        remove(_name(name), dir_fd=self._fd(node))
        self._changed(node)
        return b""

    def _rename(self, node: int, body: bytes, at: int) -> bytes:
        to, old, new = struct.unpack_from("<Q", body)[0], *body[at:].split(b"\0")[:2]
        if at == 16 and struct.unpack_from("<I", body, 8)[0]:
            raise OSError(errno.EINVAL, "flags")  # NFS knows no exchange
        os.rename(old, new, src_dir_fd=self._fd(node), dst_dir_fd=self._fd(to))
        self._changed(node, to)
        return b""

    def _link(self, node: int, body: bytes) -> bytes:
        [old] = struct.unpack_from("<Q", body)
        os.link(self._path(old), _name(body[8:]), dst_dir_fd=self._fd(node), follow_symlinks=True)
        self._changed(node)
        return self._entry(node, _name(body[8:]))

    def _open(self, node: int, body: bytes) -> bytes:
        [flags] = struct.unpack_from("<I", body)
        fd = os.open(self._path(node), flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW))
        # The attributes alone are forgotten: an offset below 0 says so.
        self._say(2, 0, struct.pack("<Qqq", node, -1, 0))
        return struct.pack("<QII", fd, DIRECT_IO, 0)

    def _create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        name = _name(body[16:])
        fd = os.open(name, flags | os.O_CREAT, mode, dir_fd=self._fd(node))
        self._changed(node)
        return self._entry(node, name) + struct.pack("<QII", fd, DIRECT_IO, 0)

    def _read(self, _: int, body: bytes) -> bytes:
        handle, offset, size, *_ = READ.unpack_from(body)
        return os.pread(handle, size, offset)

    def _write(self, _: int, body: bytes) -> bytes:
        handle, offset, size, *_ = WRITE.unpack_from(body)
        written = os.pwrite(handle, body[WRITE.size : WRITE.size + size], offset)
        return struct.pack("<II", written, 0)

    def _statfs(self, node: int, _: bytes) -> bytes:
        f = os.statvfs(self._fd(node))
        counts = (f.f_blocks, f.f_bfree, f.f_bavail, f.f_files, f.f_ffree)
        return struct.pack("<5Q10I", *counts, f.f_bsize, f.f_namemax, f.f_frsize, *[0] * 7)

    def _opendir(self, node: int, _: bytes) -> bytes:
        number = max(self._listings, default=0) + 1
        with os.scandir(self._path(node)) as entries:
            self._listings[number] = [
                (e.name, e.inode(), stat.S_IFMT(e.stat(follow_symlinks=False).st_mode) >> 12)
                for e in entries
            ]
        return struct.pack("<QII", number, CACHE_DIR | KEEP_CACHE, 0)

    def _readdir(self, _: int, body: bytes) -> bytes:
        handle, offset, size, *_ = READ.unpack_from(body)
        answer = b""
        for place, (name, inode, kind) in enumerate(self._listings[handle][offset:], offset + 1):
            data = os.fsencode(name)
            entry = struct.pack("<QQII", inode, place, len(data), kind) + data
            entry += bytes(-len(entry) % 8)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        return answer

    @staticmethod
    def _done(do: Callable[..., Any], *arguments: Any) -> bytes:
        do(*arguments)
        return b""


def _name(body: bytes) -> str:
    return os.fsdecode(body.partition(b"\0")[0])


def _handle(body: bytes) -> int:
    return int(struct.unpack_from("<Q", body)[0])


def _attributes(f: os.stat_result) -> bytes:
    """A file's attributes, with times in whole seconds."""
    times = (t // GRANULARITY for t in (f.st_atime_ns, f.st_mtime_ns, f.st_ctime_ns))
    owner = (f.st_mode, f.st_nlink, f.st_uid, f.st_gid, f.st_rdev, f.st_blksize, 0)
    return ATTR.pack(f.st_ino, f.st_size, f.st_blocks, *times, 0, 0, 0, *owner)


if __name__ == "__main__":
    behind, point, seconds, host = sys.argv[1:]
    client = Client(behind, mount(point, host), float(seconds))
    os.umask(0)
    print("ready", flush=True)
    client.serve()
