"""Start HAProxy for Serve with its side doors shut; runs by itself (``python -I -S``), without shoal or Ray.

Ray writes HAProxy's configuration from a fixed template (``serve/_private/haproxy_templates.py``) in which
the statistics and metrics pages listen on every interface without a password, and the admin socket is open
to every user of the machine. There is no setting for either. Serve lets an operator
name the HAProxy binary: we name a script that mends the file, checks the result, and becomes HAProxy.

It also asks the kernel to kill HAProxy when the process that started it dies. Otherwise a HAProxy outlives a
cluster that died hard, keeps its port, and the next cluster cannot serve.
"""

import ctypes
import os
import re
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LOOPBACK = "127.0.0.1"
_HEADERS_TIMEOUT_S = 10
"""For a request's headers. Ray sets none, so a client may take an hour, and 4,096 connections that drip headers
lock everybody else out. A body may take longer, since HAProxy buffers none; nor does this end idle connections,
for which Ray sets a time."""
_BIND = r"(?m)^\s*bind\s+(\S+)"


def mend(text: str, side_ports: list[str], serve: str) -> str:
    """Return the configuration with statistics and metrics on loopback, the admin socket private, slow headers cut.

    ``side_ports`` are the ports of the statistics and metrics pages, ``serve`` is "host:port" where the
    applications answer; nothing else may listen.

    Raises:
        ValueError: the text does not look as expected, so that something may still be open.
    """
    allowed = {serve, *(f"{_LOOPBACK}:{port}" for port in side_ports)}
    for port in side_ports:
        text, found = re.subn(rf"(?m)^(\s*bind\s+)\*?:{port}\b", rf"\g<1>{_LOOPBACK}:{port}", text)
        if not found and not re.search(rf"(?m)^\s*bind\s+{re.escape(_LOOPBACK)}:{port}\b", text):
            raise ValueError(f"no `bind` line for port {port}")
    if side_door := next((found for found in re.findall(_BIND, text) if found not in allowed), None):
        raise ValueError(f"an unexpected `bind {side_door}`")
    text = re.sub(r"(?m)^(\s*stats socket \S+ mode) 666\b", r"\g<1> 600", text)
    if not re.search(r"(?m)^\s*stats socket \S+ mode 600\b", text):
        raise ValueError("no `stats socket ... mode 600` line")
    if not re.search(r"(?m)^\s*timeout http-request ", text):
        limit = f"    timeout http-request {_HEADERS_TIMEOUT_S}s\n"
        text, found = re.subn(r"(?m)^(defaults[ \t]*\n)", rf"\g<1>{limit}", text)
        if found != 1:
            raise ValueError(f"{found} sections `defaults`")
    return text


def main(argv: list[str]) -> str:
    """Mend the file after ``-f`` and become ``argv[0]``, HAProxy, with the same arguments; or say why not."""
    config = argv[argv.index("-f") + 1]
    side_ports = [os.environ[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS")]
    serve = "{}:{}".format(
        os.environ["SHOAL_SERVE_HOST"].replace("0.0.0.0", "*"), os.environ["SHOAL_SERVE_PORT"]
    )
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        return "the process that started HAProxy is gone"
    with open(config) as file:
        text = file.read()
    try:
        mended = mend(text, side_ports, serve)
    except ValueError as error:
        return f"shoal refuses to start HAProxy: {config} has {error}; Ray's template has changed"
    with open(f"{config}.mended", "w") as file:
        file.write(mended)
    os.replace(f"{config}.mended", config)
    return os.execv(argv[0], argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
