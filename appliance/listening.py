"""The one listening socket: made here, or taken from systemd, and by which names it is asked for.

A TCP socket listens on loopback. A socket that systemd passes (sd_listen_fds(3)) may also be a UNIX one, behind
systemd-socket-proxyd: then no inet socket is in any process, and `listen.host` and `listen.port` say what visitors type.
"""

from __future__ import annotations

import os
import socket

from appliance.config import Config, is_loopback
from appliance.errors import BadRequest


def listener_for(config: Config) -> socket.socket:
    """Return the listening socket: systemd's where it passes one, otherwise a new one. Raises `BadRequest`."""
    passed = _passed_by_systemd()
    return passed if passed is not None else listen(config.host, config.port)


def listen(host: str, port: int) -> socket.socket:
    """Return a bound, listening TCP socket. Raises `BadRequest`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # So that a restart does not wait for the last connections' TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise BadRequest(
            "listen", f"{host} port {port} cannot be listened on: {(error.strerror or 'unknown').lower()}",
            hint="end the other program, or choose another port with --port",
        ) from None
    return listener


def _passed_by_systemd() -> socket.socket | None:
    if "LISTEN_FDS" not in os.environ:
        return None
    from systemd import daemon

    # A LISTEN_PID that is another process's would otherwise be ignored, and the appliance would listen somewhere else.
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        raise BadRequest(
            "socket_activation",
            "LISTEN_FDS is set, and LISTEN_PID is not this process: the socket that was passed would be ignored",
            hint="start darkroom itself as the unit's process, with no shell and no init in between",
        )
    descriptors = daemon.listen_fds(unset_environment=True)
    if len(descriptors) != 1:
        raise BadRequest("socket_activation", f"systemd passed {len(descriptors)} sockets; Darkroom listens on exactly one")
    listener = socket.socket(fileno=descriptors[0])
    os.set_inheritable(listener.fileno(), False)
    if listener.type != socket.SOCK_STREAM or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise BadRequest("socket_activation", "the socket that systemd passed is no listening stream socket")
    if listener.family != socket.AF_UNIX and not is_loopback(listener.getsockname()[0]):
        raise BadRequest(
            "socket_activation", "the socket that systemd passed can be reached from other machines, in plain HTTP",
            hint="let it listen on 127.0.0.1, ::1 or a UNIX path",
        )
    return listener


def _port(listener: socket.socket, config: Config) -> int:
    return config.port if listener.family == socket.AF_UNIX else int(listener.getsockname()[1])


def allowed_hosts(listener: socket.socket, config: Config) -> tuple[str, ...]:
    """Return the Host values under which the pages answer: the name that was asked for, and those of loopback."""
    port = _port(listener, config)
    host = config.host
    names = {"127.0.0.1", "localhost", "[::1]", f"[{host}]" if ":" in host else host}
    return tuple(sorted(f"{name}:{port}" for name in names) + (sorted(names) if port == 80 else []))


def address(listener: socket.socket, config: Config) -> str:
    """Return the address to open in a browser."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{_port(listener, config)}/"
