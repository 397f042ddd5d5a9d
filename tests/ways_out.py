"""Every way out that is known, as code for `Taken.inside`: each way by name, with what became of it.

"through" means that the call did what a way out needs; whether anything arrived is for the listeners outside to say.
"""

from __future__ import annotations


def filled(code: str, **values: object) -> str:
    """Return the code with each @name@ replaced by the value, as Python writes it."""
    for name, value in values.items():
        code = code.replace(f"@{name}@", repr(value))
    return code


_BEGIN = """
import ctypes, errno, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
answer = {}
def way(name, attempt):
    try:
        done = attempt()
        answer[name] = "through" if done is not False else "nothing there to try it with"
    except OSError as error:
        answer[name] = "refused: " + (errno.errorcode.get(error.errno, str(error)) if error.errno else str(error))
def call(number, *arguments):
    ctypes.set_errno(0)
    done = libc.syscall(number, *arguments)
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return True
def address(port):
    return struct.pack("=HH4s8x", socket.AF_INET, socket.htons(port), socket.inet_aton("127.0.0.1"))
def mine(listening):
    # every inet socket that this process has open, in copies: what is tried must not close the real one
    for fd in range(3, 1024):
        try:
            one = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue
        try:
            if one.family == socket.AF_INET and bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) == listening:
                if listening or one.getpeername():
                    return one
        except OSError:
            pass
        one.close()
    return None
UNSPEC = struct.pack("=H14x", socket.AF_UNSPEC)
"""

NETWORK = _BEGIN + """
def fresh():
    one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    one.settimeout(5)
    one.connect(("127.0.0.1", @port@))
    one.sendall(b"fresh")
way("a new TCP socket", fresh)
def datagram():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"datagram", ("127.0.0.1", @port@))
way("a new UDP socket", datagram)
for family in range(46):
    for kind in (1, 2, 3, 5):
        if family == 1:
            continue
        try:
            socket.socket(family, kind).close()
            answer["families"] = "through"
        except OSError:
            pass
answer.setdefault("families", "refused")
# From here on without giving the interpreter's lock away: gunicorn would close a socket that it sees disconnected.
libc = ctypes.PyDLL(None, use_errno=True)
def header(what, where):
    text = ctypes.create_string_buffer(what)
    vector = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(text), len(what)))
    packed = struct.pack("=QIxxxxQQQQIxxxxIxxxx", ctypes.addressof(where), 16, ctypes.addressof(vector), 1, 0, 0, 0, 0)
    kept.extend((text, vector, where))
    return ctypes.create_string_buffer(packed)
kept = []
def accepted(trick):
    def attempt():
        one = mine(False)
        if one is None:
            return False
        # Blocking only where it is the listener outside that is waited for: the real socket shares that flag.
        if libc.syscall(42, one.fileno(), UNSPEC, 16) == 0:
            one.setblocking(True)
        return trick(one)
    return attempt
where = ctypes.create_string_buffer(address(@port@))
way("accepted socket, connected anew", accepted(
    lambda one: call(42, one.fileno(), address(@port@), 16) and call(44, one.fileno(), b"accepted", 8, 0, 0, 0)
))
way("accepted socket, bound anew", accepted(lambda one: call(49, one.fileno(), address(0), 16)))
way("accepted socket, fast open by sendto", accepted(
    lambda one: call(44, one.fileno(), b"sendto", 6, 0x20000000, address(@port@), 16)
))
way("accepted socket, fast open by sendmsg", accepted(
    lambda one: call(46, one.fileno(), header(b"sendmsg", where), 0x20000000)
))
way("accepted socket, fast open by sendmmsg", accepted(
    lambda one: call(307, one.fileno(), header(b"sendmmsg", where), 1, 0x20000000)
))
"""

# Where these get through they end the listening socket, and gunicorn's worker with it: they are a run of their own, and what
# arrives outside is what counts.
LISTENER = _BEGIN + """
libc = ctypes.PyDLL(None, use_errno=True)
def sent(one, what, flags):
    return call(44, one.fileno(), what, len(what), flags, address(@port@), 16)
def listening(trick):
    def attempt():
        one = mine(True)
        if one is None:
            return False
        return trick(one)
    return attempt
def blocking(one):
    one.setblocking(True)
    return True
without_shutdown = listening(lambda one: sent(one, b"listener-straight", 0x20000000))
after_shutdown = listening(lambda one: call(48, one.fileno(), 2) and blocking(one) and sent(one, b"listener-sendto", 0x20000000))
connected_anew = listening(lambda one: (
    call(42, one.fileno(), UNSPEC, 16) and blocking(one) and call(42, one.fileno(), address(@port@), 16)
    and call(44, one.fileno(), b"listener", 8, 0, 0, 0)
))
tricks = {
    "listening socket, fast open": without_shutdown,
    "listening socket, fast open after shutdown": after_shutdown,
    "listening socket, connected anew": connected_anew,
}
for name in @tricks@:
    way(name, tricks[name])
"""

LISTENER_TRICKS = (
    "listening socket, fast open", "listening socket, fast open after shutdown", "listening socket, connected anew",
)

UNIX = _BEGIN + """
def told(name):
    return @canary@ + b" " + name.encode()
def stream(path, name):
    def attempt():
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.settimeout(5)
        one.connect(path)
        one.sendall(told(name))
    return attempt
def datagram(path, name):
    def attempt():
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(told(name), path)
    return attempt
def paired(path, name):
    def attempt():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.sendto(told(name), path)
    return attempt
def turned(path, name):
    def attempt():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.connect(path)
        ours.send(told(name))
    return attempt
for name, path in @streams@.items():
    way(name + ", connected to", stream(path, name + ", connected to"))
for name, path in @datagrams@.items():
    for how, attempt in (
        (", sent to", datagram), (", sent to from one of a pair", paired), (", connected to with one of a pair", turned),
    ):
        way(name + how, attempt(path, name + how))
"""

OTHERS = _BEGIN + """
libc.process_vm_readv.restype = ctypes.c_ssize_t
def opened(path, mode=os.O_RDONLY):
    return lambda: os.close(os.open(path, mode))
def listed(path):
    return lambda: os.listdir(path) is None
for pid in @peers@:
    way("memory of a peer", opened("/proc/%d/mem" % pid))
    way("environment of a peer", opened("/proc/%d/environ" % pid))
    way("descriptors of a peer", listed("/proc/%d/fd" % pid))
    way("ptrace attach", lambda: call(101, 16, pid, 0, 0))
    way("ptrace seize", lambda: call(101, 0x4206, pid, 0, 0))
    way("process_vm_readv", lambda: call(310, pid, 0, 0, 0, 0, 0))
    way("pidfd_open", lambda: call(434, pid, 0))
    way("a signal to a peer", lambda: os.kill(pid, 0))
for path in @unreadable@:
    way("reading " + path, opened(path))
for folder in @unwritable@:
    def write(folder=folder):
        path = folder + "/darkroom-taken-over"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        os.unlink(path)
    way("writing in " + folder, write)
way("unshare", lambda: call(272, 0x04000000))
way("io_uring", lambda: call(425, 4, ctypes.create_string_buffer(120)))
def forked():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
way("a new process", forked)
way("another program", lambda: call(59, b"/nowhere", 0, 0))
way("a memfd", lambda: os.close(os.memfd_create("x")))
way("dumpable again", lambda: call(157, 4, 1, 0, 0, 0))
way("core dumps again", lambda: call(302, 0, 4, struct.pack("=QQ", 1, 1), 0))
"""
