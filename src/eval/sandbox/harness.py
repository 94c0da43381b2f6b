"""Runs the program on standard input and says how it ended, on a line that begins with the input's first line."""

import os
import sys
import types


def run():
    # Whatever the parent left open is none of the program's business.
    os.closerange(3, 65536)
    token = sys.stdin.readline().strip()
    program = sys.stdin.read()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    sys.path[:] = [path for path in sys.path if path]
    # What it prints is nobody's: only the line at the end counts.
    sys.stdout = sys.stderr = open(os.devnull, "w")
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    say, leave = os.write, os._exit
    try:
        exec(compile(program, "answer", "exec"), module.__dict__)
        verdict = "passed"
    except BaseException as error:
        try:
            verdict = "raised " + (type(error).__name__ + ": " + str(error))[:400].replace("\n", " ")
        except BaseException:
            verdict = "raised an exception that cannot be told"
    say(1, ("\n" + token + " " + verdict + "\n").encode("utf-8", "replace"))
    leave(0)


run()
