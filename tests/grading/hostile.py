"""Programs that try to break out, to cheat or to hang. Each must score 0 and leave the machine and the pool as they were.

Every program is graded on `solve(x)`, whose right values it cannot know. In the sources FOLDER stands for a directory of the host that
anybody may write to, PORT for a TCP port on which the host listens, SOCKET for a Unix socket of the host, PID for a process of the host.
"""

from __future__ import annotations

import textwrap


def _source(text: str) -> str:
    return textwrap.dedent(text).strip() + "\n"


_ATTEMPT = """
def attempt(action, *arguments):
    try:
        return action(*arguments)
    except BaseException as error:
        return error
"""

_RAW = {
    # Too much of something.
    "fork_bomb": """
        import os
        def solve(x):
            while True:
                try:
                    os.fork()
                except OSError:
                    pass
    """,
    "thread_bomb": """
        import threading, time
        def solve(x):
            while True:
                threading.Thread(target=time.sleep, args=(1000,)).start()
    """,
    "memory_bomb": """
        def solve(x):
            kept = []
            while True:
                kept.append(bytearray(50_000_000))
    """,
    "memory_bomb_swallowed": """
        def solve(x):
            kept = []
            while True:
                try:
                    kept.append("x" * 10_000_000 + str(len(kept)))
                except MemoryError:
                    pass
    """,
    "mapping_bomb": """
        import mmap
        kept = []
        def solve(x):
            while True:
                kept.append(mmap.mmap(-1, 1 << 24))
                kept[-1].write(b"x" * (1 << 24))
    """,
    "memory_files": """
        import os
        kept = []
        def solve(x):
            while True:
                kept.append(os.memfd_create("hidden"))
                os.write(kept[-1], bytes(1 << 24))
    """,
    "endless_output": """
        def solve(x):
            while True:
                print("x" * 100_000)
    """,
    "endless_errors": """
        import os
        def solve(x):
            while True:
                os.write(2, b"x" * 100_000)
    """,
    "endless_frames": """
        import os
        def solve(x):
            while True:
                for descriptor in range(64):
                    try:
                        os.write(descriptor, b"x" * 100_000)
                    except OSError:
                        pass
    """,
    "huge_value": """
        def solve(x):
            return [["x" * 100] * 1000] * 100_000
    """,
    "deep_value": """
        def solve(x):
            value = x
            for _ in range(100_000):
                value = [value]
            return value
    """,
    "endless_value": """
        def solve(x):
            value = []
            value.append(value)
            return value
    """,
    "colliding_hashes": """
        def solve(x):
            return {number * (2 ** 61 - 1) for number in range(3000)}
    """,
    "endless_iterator": """
        class Endless(list):
            def __iter__(self):
                while True:
                    yield 1
            def __len__(self):
                return 1
        def solve(x):
            return Endless([1, 2])
    """,
    "deep_recursion": """
        import sys
        sys.setrecursionlimit(10 ** 9)
        def solve(x):
            return solve(x + 1)
    """,
    "disk_full": """
        def solve(x):
            for number in range(10 ** 9):
                with open(f"file{number}", "wb") as file:
                    file.write(bytes(1 << 22))
    """,
    "inodes_full": """
        import os
        def solve(x):
            for number in range(10 ** 9):
                os.mkdir(f"folder{number}")
    """,
    "megabyte_source": "def solve(x):\n    return [" + "0," * 1_000_000 + "]\n",
    "deep_source": "def solve(x):\n    return " + "(" * 50_000 + ")" * 50_000 + "\n",
    "zero_bytes": "def solve(x):\n    return '\0'\n",
    "lone_surrogates": """
        def solve(x):
            return chr(0xD800) * 10
    """,
    "huge_integer": """
        def solve(x):
            return 10 ** 1_000_000
    """,
    # Never coming back.
    "loop": """
        def solve(x):
            while True:
                pass
    """,
    "loop_in_c": """
        def solve(x):
            return 7 ** (10 ** 10) % 2
    """,
    "sleep": """
        import time
        def solve(x):
            time.sleep(10 ** 6)
    """,
    "loop_while_loading": """
        while True:
            pass
    """,
    "swallowed_timeout": """
        def solve(x):
            while True:
                try:
                    while True:
                        pass
                except BaseException:
                    pass
    """,
    "ignored_signals": """
        import signal
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGXCPU, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        def solve(x):
            while True:
                pass
    """,
    "blocked_signals": """
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        signal.setitimer(signal.ITIMER_REAL, 0)
        def solve(x):
            while True:
                pass
    """,
    "exit_hangs": """
        import atexit, time
        atexit.register(time.sleep, 10 ** 6)
        def solve(x):
            return None
    """,
    "finalizer_hangs": """
        class Sticky:
            def __del__(self):
                while True:
                    pass
        def solve(x):
            one = Sticky()
            del one
            return None
    """,
    "thread_left_running": """
        import threading
        def spin():
            while True:
                pass
        threading.Thread(target=spin).start()
        def solve(x):
            return None
    """,
    "catastrophic_pattern": """
        import re
        def solve(x):
            return re.match(r"(a+)+$", "a" * 40 + "b")
    """,
    # Files.
    "delete_files": _ATTEMPT + """
import os, shutil
def solve(x):
    attempt(shutil.rmtree, "FOLDER", True)
    attempt(os.unlink, "FOLDER/canary")
    attempt(os.rename, "FOLDER/canary", "FOLDER/gone")
    attempt(os.truncate, "FOLDER/canary", 0)
    return None
""",
    "write_outside": _ATTEMPT + """
import os
def solve(x):
    for path in ("FOLDER/new", "FOLDER/canary", "/etc/passwd", "/usr/bin/new", "/new", "/proc/sys/kernel/core_pattern", "/dev/shm/new"):
        attempt(lambda: open(path, "w").write("harm"))
    return None
""",
    "symbolic_link": _ATTEMPT + """
import os
def solve(x):
    attempt(os.symlink, "FOLDER/canary", "way")
    attempt(lambda: open("way", "w").write("harm"))
    attempt(os.symlink, "FOLDER", "folder")
    attempt(os.unlink, "folder/canary")
    return attempt(lambda: open("way").read())
""",
    "hard_link": _ATTEMPT + """
import os
def solve(x):
    attempt(os.link, "FOLDER/canary", "way")
    attempt(lambda: open("way", "w").write("harm"))
    return attempt(lambda: open("way").read())
""",
    "parent_directories": _ATTEMPT + """
import os
def solve(x):
    attempt(os.chdir, "../" * 50 + "FOLDER")
    attempt(lambda: open("../" * 50 + "FOLDER/canary", "w").write("harm"))
    return attempt(os.listdir, "../" * 50)
""",
    "change_root": _ATTEMPT + """
import os
def solve(x):
    attempt(os.mkdir, "jail")
    attempt(os.chroot, "jail")
    for _ in range(50):
        attempt(os.chdir, "..")
    attempt(os.chroot, ".")
    return attempt(lambda: open("FOLDER/canary", "w").write("harm"))
""",
    "change_mode": _ATTEMPT + """
import os
def solve(x):
    attempt(os.chmod, "FOLDER/canary", 0)
    attempt(os.chown, "FOLDER/canary", 1, 1)
    attempt(os.chmod, "/usr", 0o777)
    return None
""",
    "become_root": _ATTEMPT + """
import os
def solve(x):
    for change in (os.setuid, os.seteuid, os.setgid):
        attempt(change, 0)
    attempt(os.setgroups, [0])
    attempt(lambda: open("FOLDER/canary", "w").write("harm"))
    return os.getuid() if os.getuid() else "root"
""",
    "setuid_program": _ATTEMPT + """
import os, shutil
def solve(x):
    attempt(shutil.copy, "/bin/sh", "shell")
    attempt(os.chmod, "shell", 0o4755)
    attempt(os.execv, "shell", ["shell", "-c", "rm -rf FOLDER/*"])
    return None
""",
    "device_nodes": _ATTEMPT + """
import os, stat
def solve(x):
    attempt(os.mknod, "disk", 0o666 | stat.S_IFBLK, os.makedev(254, 0))
    attempt(os.mknod, "memory", 0o666 | stat.S_IFCHR, os.makedev(1, 1))
    return attempt(lambda: len(open("disk", "rb").read(512)))
""",
    "mount": _ATTEMPT + """
import ctypes, os
def solve(x):
    libc = ctypes.CDLL(None)
    for flags in (0x10000000, 0x00020000, 0x40000000, 0x10020000):
        if libc.unshare(flags) == 0:
            return "unshared"
    if libc.mount(b"none", b"/scratch", b"tmpfs", 0, None) == 0 or libc.umount2(b"/proc", 2) == 0:
        return "mounted"
    return None
""",
    # The network.
    "tcp": _ATTEMPT + """
import socket
def solve(x):
    return attempt(lambda: socket.create_connection(("127.0.0.1", PORT), timeout=1))
""",
    "udp": _ATTEMPT + """
import socket
def solve(x):
    return attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"harm", ("127.0.0.1", PORT)))
""",
    "unix_socket": _ATTEMPT + """
import socket
def solve(x):
    return attempt(lambda: socket.socket(socket.AF_UNIX).connect("SOCKET"))
""",
    "abstract_socket": _ATTEMPT + """
import socket
def solve(x):
    return attempt(lambda: socket.socket(socket.AF_UNIX).connect(chr(0) + "antisd-canary"))
""",
    "names": _ATTEMPT + """
import socket
def solve(x):
    return attempt(socket.gethostbyname, "example.com")
""",
    "raw_socket": _ATTEMPT + """
import socket
def solve(x):
    return [attempt(socket.socket, family, socket.SOCK_RAW) for family in (socket.AF_INET, socket.AF_PACKET, socket.AF_NETLINK)]
""",
    "download": _ATTEMPT + """
import urllib.request
def solve(x):
    return attempt(lambda: urllib.request.urlopen("http://127.0.0.1:PORT/", timeout=1).read())
""",
    # Other processes.
    "kill_parent": _ATTEMPT + """
import os, signal
def solve(x):
    for pid in (os.getppid(), PID, 1, 0, -1):
        attempt(os.kill, pid, signal.SIGKILL)
    attempt(os.killpg, 0, signal.SIGKILL)
    return None
""",
    "kill_in_c": """
import ctypes
def solve(x):
    libc = ctypes.CDLL(None)
    for pid in (PID, 1, -1):
        libc.kill(pid, 9)
        libc.syscall(234, pid, pid, 9)
        libc.syscall(424, pid, 9, 0, 0)
    return None
""",
    "trace": _ATTEMPT + """
import ctypes
def solve(x):
    libc = ctypes.CDLL(None)
    return [libc.ptrace(16, pid, 0, 0) for pid in (PID, 1)]
""",
    "others_memory": _ATTEMPT + """
import os
def solve(x):
    found = []
    for pid in [*range(1, 50), PID, os.getppid()]:
        for name in ("mem", "environ", "maps", "cmdline"):
            found.append(attempt(lambda: open(f"/proc/{pid}/{name}", "rb").read(4096)))
    return [str(one) for one in found if isinstance(one, bytes)]
""",
    "write_own_runner": _ATTEMPT + """
import os
def solve(x):
    for name in os.listdir("/proc"):
        attempt(lambda: open(f"/proc/{name}/mem", "r+b").write(b"harm"))
    return None
""",
    "daemon": _ATTEMPT + """
import os, time
def start():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
def solve(x):
    return attempt(start)
""",
    "raw_clone": """
import ctypes, time
def solve(x):
    libc = ctypes.CDLL(None)
    for flags in (17, 17 | 0x8000, 17 | 0x20000000, 17 | 0x10000000):
        if libc.syscall(56, flags, 0, 0, 0, 0) == 0:
            time.sleep(1000)
    if libc.syscall(58) == 0 or libc.syscall(435, 0, 0) == 0:
        time.sleep(1000)
    return None
""",
    "zombies": _ATTEMPT + """
import os
def solve(x):
    for _ in range(1000):
        if attempt(os.fork) == 0:
            os._exit(0)
    return None
""",
    "shell": _ATTEMPT + """
import os, subprocess
def solve(x):
    attempt(os.system, "touch FOLDER/new")
    attempt(subprocess.run, ["/bin/sh", "-c", "touch FOLDER/new; kill -9 -1"])
    attempt(os.posix_spawn, "/bin/sh", ["sh", "-c", "touch FOLDER/new"], {})
    os.execv("/bin/sh", ["sh", "-c", "sleep 1000"])
""",
    "outlive_parent": _ATTEMPT + """
import ctypes, os
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
attempt(os.setsid)
attempt(os.setpgid, 0, 0)
def solve(x):
    while True:
        pass
""",
    # Cheating.
    "exit_0": """
        import sys
        def solve(x):
            sys.exit(0)
    """,
    "exit_0_at_once": """
        import os
        os._exit(0)
    """,
    "system_exit_while_loading": """
        raise SystemExit(0)
    """,
    "equal_to_all": """
        class Same:
            def __eq__(self, other):
                return True
            def __ne__(self, other):
                return False
            def __hash__(self):
                return 0
        def solve(x):
            return Same()
    """,
    "lying_integer": """
        class Lying(int):
            def __eq__(self, other):
                return True
            def __ne__(self, other):
                return False
            def __hash__(self):
                return 0
            def __index__(self):
                raise SystemExit(0)
            __int__ = __index__
            __repr__ = __str__ = lambda self: "True"
        def solve(x):
            return Lying(x)
    """,
    "lying_text": """
        class Lying(str):
            __eq__ = lambda self, other: True
            __ne__ = lambda self, other: False
            __hash__ = str.__hash__
        def solve(x):
            return Lying("x")
    """,
    "claimed_class": """
        class Claimed:
            __class__ = int
            __eq__ = lambda self, other: True
            __reduce__ = lambda self: (exit, (0,))
        def solve(x):
            return Claimed()
    """,
    "patched_builtins": """
        import builtins, json, ast, operator, marshal
        for name in ("all", "any", "len", "isinstance", "type", "issubclass", "print", "enumerate"):
            setattr(builtins, name, lambda *arguments, **keywords: True)
        builtins.AssertionError = type("Never", (BaseException,), {})
        json.dumps = json.loads = ast.literal_eval = operator.eq = marshal.loads = lambda *arguments, **keywords: True
        def solve(x):
            return None
    """,
    "patched_runner": """
        import gc, sys, types
        def solve(x):
            for one in gc.get_objects():
                if isinstance(one, dict) and "encode" in one and "quote" in one:
                    one["encode"] = one["quote"] = lambda value: "true"
                if isinstance(one, types.FunctionType) and one.__name__ in ("_one", "encode", "failed", "send"):
                    one.__code__ = (lambda *arguments: True).__code__
            return None
    """,
    "frames_of_the_grader": """
        import gc, inspect, sys
        def solve(x):
            seen = []
            frame = sys._getframe()
            while frame is not None:
                seen.append(str({name: value for name, value in frame.f_locals.items()}))
                frame = frame.f_back
            seen += [str(one)[:10_000] for one in gc.get_objects() if isinstance(one, (dict, list, tuple))]
            numbers = {int(word) for text in seen for word in "".join(c if c.isdigit() else " " for c in text).split() if len(word) < 12}
            return sorted(number for number in numbers if number > 900_000)
    """,
    "read_the_tests": _ATTEMPT + """
import os
def solve(x):
    found = []
    for top, folders, files in os.walk("/"):
        found += [os.path.join(top, name) for name in files if name in ("test_sandbox.py", "hostile.py", "canary") or name.endswith(".jsonl")]
        if top.count("/") > 3:
            folders.clear()
    return [attempt(lambda: open(path).read()) for path in found]
""",
    "forged_frames": """
        import os
        def solve(x):
            for index in range(5):
                for content in ("true", str(x), '["x","y"]', '["l",["x","y"]]'):
                    text = f'["case",{index},{content}]'.encode()
                    for descriptor in range(3, 64):
                        try:
                            os.write(descriptor, len(text).to_bytes(4, "little") + text)
                        except OSError:
                            pass
            os._exit(0)
    """,
    "broken_frames": """
        import os
        def solve(x):
            for data in (b"\\xff" * 4, b"\\x02\\0\\0\\0[[" , b"\\x10\\0\\0\\0" + b"[" * 16):
                for descriptor in range(3, 64):
                    try:
                        os.write(descriptor, data)
                    except OSError:
                        pass
            os._exit(0)
    """,
    "deep_frames": """
        import os
        def solve(x):
            text = b'["case",0,' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"]"
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, len(text).to_bytes(4, "little") + text)
                except OSError:
                    pass
            os._exit(0)
    """,
    "closed_descriptors": """
        import os
        def solve(x):
            os.closerange(0, 1024)
            return None
    """,
    "import_the_grader": _ATTEMPT + """
def solve(x):
    for name in ("megatron_antisd", "megatron_antisd.grading.code", "tests.grading.hostile", "hostile"):
        if not isinstance(attempt(__import__, name), ImportError):
            return name
    return None
""",
    "import_hooks": """
        import sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                raise SystemExit(0)
        sys.meta_path.insert(0, Finder())
        sys.modules.clear()
        def solve(x):
            return None
    """,
    "tracer": """
        import sys
        def tracer(frame, event, argument):
            for name in list(frame.f_locals):
                if name in ("text", "index"):
                    frame.f_locals[name] = "true"
            return tracer
        sys.settrace(tracer)
        sys.setprofile(tracer)
        def solve(x):
            return None
    """,
    "environment": """
        import os
        def solve(x):
            return [value for name, value in os.environ.items() if name not in ("PATH", "LANG", "HOME", "TMPDIR", "PWD") and "THREADS" not in name]
    """,
    "crash": """
        import ctypes
        def solve(x):
            ctypes.string_at(0)
    """,
    "crash_by_signal": """
        import faulthandler
        def solve(x):
            faulthandler._sigsegv()
    """,
    "locale": """
        import codecs, locale, sys
        locale.setlocale(locale.LC_ALL, "C")
        codecs.register_error("strict", lambda error: ("", error.end))
        sys.stdout = sys.stderr = None
        def solve(x):
            return "\\ud800\\x00\\u202e"
    """,
    "wrong_name": """
        def Solve(x):
            return x
    """,
}

PROGRAMS: dict[str, str] = {name: text if name in ("megabyte_source", "deep_source", "zero_bytes") else _source(text) for name, text in _RAW.items()}

# Programs on standard input and output; what they must write they cannot know either.
SCRIPTS: dict[str, str] = {name: _source(text) for name, text in {
    "endless_output": "while True: print('x' * 100_000)",
    "silent_loop": "while True: pass",
    "exit_0": "import sys\nsys.exit(0)",
    "closed_output": "import os, time\nos.close(1)\ntime.sleep(1000)",
    "kill_runner": "import os\nfor pid in (os.getppid(), 1, -1):\n    try:\n        os.kill(pid, 9)\n    except OSError:\n        pass",
    "runners_memory": "import os\nfor pid in (os.getppid(), 1):\n    try:\n        print(open(f'/proc/{pid}/mem', 'rb').read(100))\n"
                      "    except OSError:\n        pass",
    "fork_bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "disk_full": "for number in range(10 ** 9): open(f'f{number}', 'wb').write(bytes(1 << 22))",
    "forged_frames": "import os\nfor descriptor in range(3, 64):\n    try:\n        os.write(descriptor, b'x' * 1000)\n"
                     "    except OSError:\n        pass",
}.items()}
