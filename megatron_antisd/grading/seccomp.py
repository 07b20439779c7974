"""System calls that a sandbox refuses, as seccomp filters (classic BPF) for x86-64 and AArch64.

Two filters: `guard` holds for everything in the sandbox, `program` is added for the untrusted program itself, which may neither
start processes nor send signals. A refused call fails with EPERM; a call of a foreign ABI ends the process.
"""

from __future__ import annotations

import platform
import struct

# Number on x86-64 and on AArch64 (the kernel's generic table); None where the call does not exist.
_GUARD: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "bind": (49, 200), "listen": (50, 201), "accept4": (288, 242),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "sethostname": (170, 161), "setdomainname": (171, 162),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266), "personality": (135, 92),
    "vhangup": (153, 58), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "mbind": (237, 235), "migrate_pages": (256, 238), "move_pages": (279, 239), "lookup_dcookie": (212, 18),
    # Memory that RLIMIT_AS does not count.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
}  # fmt: skip
_PROGRAM: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setsid": (112, 157), "setpgid": (109, 154),
}  # fmt: skip
_CLONE, _CLONE3, _PRCTL = (56, 220), (435, 435), (157, 167)

_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG = 1
_EPERM, _ENOSYS = 1, 38

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; little endian: the argument's low half comes first
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def filters() -> tuple[bytes, bytes] | None:
    """(guard, program) as arrays of `struct sock_filter`; None on a machine whose call numbers are not known here."""
    found = _ARCHITECTURES.get(platform.machine())
    if found is None:
        return None
    column, architecture = found
    guard = [_refuse(numbers[column], _EPERM) for numbers in _GUARD.values()]
    # clone3 hides its flags in memory, where no filter can look; ENOSYS makes the C library fall back to clone.
    guard += [_refuse(_CLONE3[column], _ENOSYS), _on_argument(_CLONE[column], _ANY_BIT, _NAMESPACE_FLAGS, refuse_match=True)]
    program = [_refuse(numbers[column], _EPERM) for numbers in _PROGRAM.values()]
    program += [_on_argument(_CLONE[column], _ANY_BIT, _CLONE_THREAD, refuse_match=False),
                _on_argument(_PRCTL[column], _EQUAL, _PR_SET_PDEATHSIG, refuse_match=True)]
    return _assemble(architecture, guard), _assemble(architecture, program)


def _assemble(architecture: int, rules: list[bytes]) -> bytes:
    head = [_step(_LOAD, _ARCHITECTURE), _step(_EQUAL, architecture, 1, 0), _step(_RETURN, _KILL), _step(_LOAD, _NUMBER)]
    if architecture == _ARCHITECTURES["x86_64"][1]:
        head += [_step(_AT_LEAST, _X32, 0, 1), _step(_RETURN, _KILL)]
    return b"".join([*head, *rules, _step(_RETURN, _ALLOW)])


def _refuse(number: int | None, errno: int) -> bytes:
    return b"" if number is None else _step(_EQUAL, number, 0, 1) + _step(_RETURN, _ERRNO | errno)


def _on_argument(number: int, test: int, value: int, *, refuse_match: bool) -> bytes:
    """Refuse one call depending on its first argument, allow it otherwise."""
    outcomes = (_ERRNO | _EPERM, _ALLOW) if refuse_match else (_ALLOW, _ERRNO | _EPERM)
    return b"".join([_step(_EQUAL, number, 0, 4), _step(_LOAD, _FIRST_ARGUMENT), _step(test, value, 0, 1),
                     *(_step(_RETURN, outcome) for outcome in outcomes)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
