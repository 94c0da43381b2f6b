# Everything here must be refused; CANARY is a file that lies outside of Python's library.
import os
import socket
import threading

reached = []


def reach(name, action):
    try:
        action()
    except (OSError, RuntimeError):
        return
    reached.append(name)


reach("a file", lambda: open(CANARY))
reach("a file's end", lambda: open(CANARY, "a"))
reach("a new file", lambda: open(CANARY + ".new", "w"))
reach("a folder", lambda: os.listdir(os.path.dirname(CANARY)))
reach("a mode", lambda: os.chmod(CANARY, 0o600))
reach("removing", lambda: os.remove(CANARY))
reach("a process", lambda: os.fork() or os._exit(0))
reach("a thread", lambda: threading.Thread(target=int).start())
reach("a signal", lambda: os.kill(os.getppid(), 0))
reach("a socket", socket.socket)
if not reached:
    # Last: nobody would tell what else is within reach.
    reach("a program", lambda: os.execv("/bin/sh", ["sh", "-c", "true"]))
if reached:
    raise RuntimeError("within reach: " + ", ".join(reached))
