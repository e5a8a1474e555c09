"""Runs scripts as separate processes without importing torch for each (4 of the 5 seconds of a run).

Reads one JSON object per line: argv, cwd, env, stdout, stderr (paths) and before (code to run first). Forks a child
that runs the script as __main__ until the interpreter ends, and answers with its exit code.
The arguments are further modules to import.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys

import cv2  # noqa: F401
import matplotlib.pyplot  # noqa: F401  (chooses its backend later, after the script's settings)
import psutil  # noqa: F401
import sam2.sam2_image_predictor  # noqa: F401
import torch.distributed  # noqa: F401
import torchvision.transforms.v2  # noqa: F401

for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()  # saves half a second of cleanup at the end of each child
atexit.register(os.close, 2)  # runs last: hides the frozen objects that nanobind reports as leaks


for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
else:
    sys.exit()

os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["env"])
for stream, path in ((sys.stdin, os.devnull), (sys.stdout, job["stdout"]), (sys.stderr, job["stderr"])):
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, stream.fileno())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in background processes
sys.argv[:] = job["argv"]
sys.path[0] = os.path.dirname(job["argv"][0])  # noqa: PTH120
exec(job["before"])
runpy.run_path(job["argv"][0], run_name="__main__")
