"""Runs scripts as processes of their own without importing torch anew for each (4 of the 5 seconds of a run).

The arguments are further modules to import.
Reads one JSON object a line: argv, cwd, env, stdout, stderr (paths), before (code to run first), and kill: null or
[when, signal number], where `when` is a number of seconds or a text that stdout shows. Forks a child that runs
the script as __main__ to the interpreter's own end, and answers with its exit code.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path

import cv2  # noqa: F401
import matplotlib.pyplot  # noqa: F401  (chooses its backend later, when the script has had its say)
import psutil  # noqa: F401
import sam2.sam2_image_predictor  # noqa: F401
import torch.distributed  # noqa: F401

for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()  # a child that ends need not take all this apart: half a second
atexit.register(os.close, 2)  # first in, so last out: nanobind takes what is frozen for leaks, and lists it


def kill(child, when, number, stdout, ended):
    """Send the signal when it is time, unless the child has ended before."""
    if isinstance(when, str):
        while not ended.is_set() and when not in Path(stdout).read_text("utf-8", "replace"):
            time.sleep(0.01)
    else:
        ended.wait(when)
    if not ended.is_set():
        os.kill(child, number)


for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    ended = threading.Event()
    if job["kill"]:
        threading.Thread(target=kill, args=(child, *job["kill"], job["stdout"], ended)).start()
    _, status = os.waitpid(child, 0)
    ended.set()
    print(os.waitstatus_to_exitcode(status), flush=True)
else:
    sys.exit()

os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["env"])
for stream, path in ((sys.stdin, os.devnull), (sys.stdout, job["stdout"]), (sys.stderr, job["stderr"])):
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, stream.fileno())
sys.argv[:] = job["argv"]
sys.path[0] = os.path.dirname(job["argv"][0])  # noqa: PTH120
exec(job["before"])
runpy.run_path(job["argv"][0], run_name="__main__")
