"""Programs as several processes that know of each other, as `accelerate launch` starts them."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Imports everything once. For each line it forks the processes of one run; their output goes to files, and it answers
# with the statuses. Where one of them fails, the others, which may wait for it, are stopped, as by the launcher.
SERVER = """
import json, os, runpy, signal, sys, traceback
import secateur.cli.main, secateur.cli.demo
from secateur import *
import transformers.models.llama.modeling_llama
def rank(number, run):
    os.chdir(run["cwd"])
    os.environ.update(run["environment"], RANK=str(number), LOCAL_RANK=str(number))
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{run['output']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    arguments = run["arguments"]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
for line in sys.stdin:
    run, ranks, statuses = json.loads(line), [], []
    for number in range(run["processes"]):
        process = os.fork()
        if process == 0:
            status = 0
            try:
                rank(number, run)
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        ranks.append(process)
    while ranks:
        process, status = os.waitpid(-1, 0)
        ranks.remove(process)
        statuses.append(os.waitstatus_to_exitcode(status))
        for other in ranks if status else ():
            os.kill(other, signal.SIGKILL)
    print(json.dumps(statuses), flush=True)
"""


def launch(
    *arguments: str, processes: int = 2, config: Path | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program as so many processes; with a config file of accelerate's, by its launcher.

    `arguments` are what follows `python`: `-m` and a module, or a script, and its own arguments.
    """
    if config is not None:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_DISABLE_RICH": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=300, cwd=cwd
        )
    with socket.socket() as free, tempfile.TemporaryDirectory() as output:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
        run = {"arguments": arguments, "processes": processes, "environment": meeting, "output": output}
        free.close()
        server = _server()
        print(json.dumps({**run, "cwd": str(cwd or Path.cwd())}), file=server.stdin, flush=True)
        statuses: list[int] = json.loads(server.stdout.readline())
        texts = [(Path(output) / name).read_text() for name in ("stdout", "stderr")]
    failed = next((status for status in statuses if status), 0)
    return subprocess.CompletedProcess(list(arguments), failed, *texts)


@functools.cache
def _server() -> Any:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    atexit.register(server.communicate)  # closes its input, after which it ends
    return server
