"""Ending a process exactly before its nth system call that changes a file: ptrace, on Linux for x86-64 and ARM.

Two instants between which no such call lies leave the same files behind, so that to try each of these is to try every
instant there is.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from dataclasses import dataclass

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_SYSGOOD, _EXITKILL = 1, 0x100000
_ENTRY = 1

_CHANGING = {
    "x86_64": {
        "write": 1,
        "open": 2,
        "pwrite64": 18,
        "writev": 20,
        "fsync": 74,
        "fdatasync": 75,
        "ftruncate": 77,
        "rename": 82,
        "mkdir": 83,
        "rmdir": 84,
        "unlink": 87,
        "chmod": 90,
        "openat": 257,
        "mkdirat": 258,
        "unlinkat": 263,
        "renameat": 264,
        "fchmodat": 268,
        "renameat2": 316,
    },
    "aarch64": {
        "mkdirat": 34,
        "unlinkat": 35,
        "renameat": 38,
        "ftruncate": 46,
        "fchmodat": 53,
        "openat": 56,
        "write": 64,
        "writev": 66,
        "pwrite64": 68,
        "fsync": 82,
        "fdatasync": 83,
        "renameat2": 276,
    },
}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Info(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("rest", ctypes.c_uint64 * 4),
    )


@dataclass(frozen=True)
class Traced:
    """How a traced process ended."""

    calls: int
    """How many calls that change a file it had made, or begun, since it first stopped itself."""
    last: str
    """The last of them; it was not carried out if the process was ended before it."""
    code: int


def can_trace() -> bool:
    """Whether this machine lets a process trace its children."""
    if platform.system() != "Linux" or platform.machine() not in _CHANGING:
        return False
    pid = os.fork()
    if not pid:
        try:
            be_traced()
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    stopped = os.WIFSTOPPED(status)
    if stopped:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return stopped


def be_traced() -> None:
    """To be called in the child: its parent traces it from its next stop on.

    Raises:
        OSError: this machine doesn't allow it.
    """
    _ptrace(_TRACEME, 0, 0)


def stop_here() -> None:
    """To be called in the traced child where counting is to begin."""
    os.kill(os.getpid(), signal.SIGSTOP)


def end_before_call(pid: int, number: int | None) -> Traced:
    """Follow a child that stops itself; end it before its call `number` that changes a file, counted from 1.

    None lets it run to its end, and counts.
    """
    names = {code: name for name, code in _CHANGING[platform.machine()].items()}
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        return Traced(0, "", os.waitstatus_to_exitcode(status))
    _ptrace(_SETOPTIONS, pid, _SYSGOOD | _EXITKILL)
    calls, last, forward = 0, "", 0
    while True:
        _ptrace(_SYSCALL, pid, forward)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return Traced(calls, last, os.waitstatus_to_exitcode(status))
        forward = 0
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            forward = os.WSTOPSIG(status)
            continue
        info = _Info()
        _libc.ptrace(_GET_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == _ENTRY and info.number in names:
            calls, last = calls + 1, names[info.number]
            if calls == number:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                return Traced(calls, last, os.waitstatus_to_exitcode(status))


def _ptrace(request: int, pid: int, data: int) -> None:
    if _libc.ptrace(request, pid, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
