"""How a fresh Python process shuts itself in, before it reads any untrusted code. Runs inside; stands on the standard library alone.

`enter` does what the configuration says, in this order: namespaces and a file system of its own (mode `builtin`; bubblewrap has done
it already), resource limits, an unprivileged user, no new privileges, seccomp. Any step that fails raises OSError: nothing is skipped.
"""

from __future__ import annotations

import ctypes
import os
import resource

_NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mount, UTS, IPC, PID, network
_NEW_USER = 0x10000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_ATTRIBUTES = 0x1 | 0x2 | 0x4  # read-only, nosuid, nodev
_AT_FDCWD, _AT_RECURSIVE, _DETACH = -100, 0x8000, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SIGKILL = 9
_CALLS = {"x86_64": {"mount_setattr": 442, "pivot_root": 155, "capset": 126}, "aarch64": {"mount_setattr": 442, "pivot_root": 41, "capset": 91}}
DEVICES = ("null", "zero", "full", "random", "urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def enter(config: dict) -> None:
    """Shut this process in. In mode `builtin` the caller goes on in a child, process 1 of a PID namespace; the parent waits for it."""
    user = config["user"]
    if config["mode"] not in ("bubblewrap", "builtin", "limits"):
        raise ValueError(f"unknown mode {config['mode']!r} of a sandbox")
    os.umask(0o022)  # the new root's folders must be open to the program's user
    if config["mode"] == "builtin":
        _own_namespaces(config["parent"], mapped=user is None)
        _own_root(config)
    elif config["mode"] == "limits":
        os.chdir(config["scratch"])
    _limit(config["limits"])
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if config["mode"] != "limits" or user is not None:
        _drop_capabilities()
    if config["mode"] != "bubblewrap":  # which ends with its parent by itself
        _control(_PR_SET_PDEATHSIG, _SIGKILL)
    _control(_PR_SET_DUMPABLE, 0)
    _control(_PR_SET_NO_NEW_PRIVS, 1)
    if config["guard"] is not None:
        add_filter(config["guard"])


def add_filter(program: bytes) -> None:
    """Add a seccomp filter to this thread and all that it starts. It cannot be taken away again."""
    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]

    _control(_PR_SET_SECCOMP, 2, ctypes.byref(Filter(len(program) // 8, program)))


def _own_namespaces(parent: int, mapped: bool) -> None:
    outside = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEW_NAMESPACES | (_NEW_USER if mapped else 0)), "unshare")
    if mapped:
        for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {outside[0]} 1"), ("gid_map", f"65534 {outside[1]} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _control(_PR_SET_PDEATHSIG, _SIGKILL)  # of the watcher, which does not pass it on
    if os.getppid() != parent:
        os._exit(1)  # the trusted side died before that
    child = os.fork()
    if child == 0:
        return
    # The watcher outside: the pipes are the child's alone, so that their ends tell of its death. Killed, it takes the child along.
    os.closerange(0, 64)
    os.waitpid(child, 0)
    os._exit(0)


def _own_root(config: dict) -> None:
    """A root of our own with what the interpreter needs, read-only, and a scratch directory of limited size."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m,nr_inodes=1k")
    os.mkdir("/tmp/old")
    _check(_call("pivot_root", b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    for source, place in config["links"]:
        os.symlink(source, place)
    for path in config["binds"]:
        _bind("/old" + path, path)
    for name in DEVICES:
        _bind(f"/old/dev/{name}", f"/dev/{name}", device=True)
    os.mkdir("/proc")
    try:
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "subset=pid")
    except OSError:
        pass  # a container that masks parts of its own /proc may not mount another; an empty directory shows even less
    os.mkdir(config["scratch"])
    owner = 65534 if config["user"] is None else config["user"]
    _mount("tmpfs", config["scratch"], "tmpfs", _MS_NOSUID | _MS_NODEV,
           f"mode=700,uid={owner},gid={owner},size={config['scratch_bytes']},nr_inodes=4k")
    _check(_libc.umount2(b"/old", _DETACH), "umount2")
    os.rmdir("/old")
    _mount("none", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(config["scratch"])


def _bind(source: str, place: str, device: bool = False) -> None:
    """Show `source` at `place`, with all that is mounted below, read-only unless it is a device."""
    if os.path.isdir(source):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        open(place, "w").close()
    _mount(source, place, None, _MS_BIND if device else _MS_BIND | _MS_REC)
    if not device:
        attributes = (ctypes.c_uint64 * 4)(_ATTRIBUTES, 0, 0, 0)
        _check(_call("mount_setattr", _AT_FDCWD, place.encode(), _AT_RECURSIVE, attributes, ctypes.sizeof(attributes)), f"mount_setattr {place}")


def _limit(limits: dict) -> None:
    for name, (soft, hard) in limits.items():
        number = getattr(resource, name)
        allowed = resource.getrlimit(number)[1]
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(number, (soft, hard))


def _drop_capabilities() -> None:
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3 of the interface, this process
    _check(_call("capset", header, none), "capset")


def _mount(source: str, place: str, kind: str | None, flags: int, options: str | None = None) -> None:
    done = _libc.mount(source.encode(), place.encode(), kind and kind.encode(), ctypes.c_ulong(flags), options and options.encode())
    _check(done, f"mount {kind or source} on {place}")


def _control(option: int, value: object, third: object = 0) -> None:
    """prctl. An integer goes as a full word: the kernel refuses leftovers in its upper half."""
    words = [ctypes.c_ulong(word) if isinstance(word, int) else word for word in (value, third, 0, 0)]
    _check(_libc.prctl(option, *words), f"prctl {option}")


def _call(name: str, *arguments: object) -> int:
    return _libc.syscall(ctypes.c_long(_CALLS[os.uname().machine][name]), *arguments)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
