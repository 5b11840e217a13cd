"""Cells and commands in processes of their own that need not import PyTorch again.

They are forked from a server that has imported everything and run no backward pass. A fork of the
test process itself fails once another test has run one: "Unable to handle autograd's threading in
combination with fork-based multiprocessing"
(https://github.com/pytorch/pytorch/wiki/Autograd-and-Fork).
"""

import multiprocessing
import os
import sys
from multiprocessing import forkserver

import torch
from tiny_training import run_tiny_cell

from resdiag.cli.main import app

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["forked"])

# what an optimizer imports late; no backward pass, see above
_parameter = torch.zeros(1, requires_grad=True)
_parameter.grad = torch.zeros(1)
torch.optim.SGD([_parameter], 0.1).step()


def start_cell(root, asked):
    """Start `run_tiny_cell(root, **asked)`; its exit code is 0 if it ends."""
    return _start(_run_cell, root, asked)


def start_command(words, log):
    """Start `resdiag WORDS`; what it prints is appended to the file `log`."""
    return _start(_run_command, [str(word) for word in words], log)


def wait_for(process, seconds):
    """The exit code of a process, or None if it is still running after `seconds`."""
    process.join(seconds)
    return process.exitcode


def _start(target, *args):
    # Python before 3.12.8 does not hand sys.path on, and ignores what it cannot preload
    # (https://github.com/python/cpython/issues/117378)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    process = _context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def _run_cell(root, asked):
    torch.set_num_threads(1)
    try:
        run_tiny_cell(root, **asked)
        os._exit(0)
    except BaseException as error:
        os.write(2, f"child: {type(error).__name__}: {error}\n".encode())
        os._exit(1)


def _run_command(words, log):
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 1
    try:
        code = app.run(words)
    except BaseException as error:
        os.write(2, f"Traceback: {error!r}\n".encode())
    finally:
        sys.stderr.flush()
        os._exit(code)
