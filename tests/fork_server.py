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
import warnings

exit_code = 1


def end():
    """End without Python's cleanup: freeing the objects of all packages takes 0.6 seconds in each child."""
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(exit_code)


atexit.register(end)  # before the imports below, so that it runs after what they and the script register
# matplotlib.pyplot chooses its backend later, after the script's settings
for name in ("cv2", "matplotlib.pyplot", "psutil", "sam2.sam2_image_predictor", "torch.distributed",
             "torchvision.transforms.v2", *sys.argv[1:]):
    importlib.import_module(name)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchScript is deprecated
    sys.modules["sam2.sam2_image_predictor"].SAM2Transforms(1024, 0)  # compiled once: 0.3 seconds less in each child
gc.freeze()  # so that a child's garbage collection copies no memory

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
else:
    exit_code = 0
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
try:
    runpy.run_path(job["argv"][0], run_name="__main__")
    exit_code = 0
except SystemExit as error:
    exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    raise
except KeyboardInterrupt:
    exit_code = -signal.SIGINT
    raise
