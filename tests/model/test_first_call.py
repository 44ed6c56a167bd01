"""The first vector function of a process has the bits of every later one (MKL's threads race there unless one of them went first)."""

import subprocess
import sys

PROGRAM = """
import os
import numpy as np
import torch
import pascaline.model.transformer

numbers = torch.from_numpy(np.random.default_rng(0).standard_normal((639, 400), np.float32))
found = set()
for _ in range(200):
    read, write = os.pipe()
    if not os.fork():
        # threads that are there already, as a model's matmuls leave them
        torch.ones(300, 300) @ torch.ones(300, 300)
        os.write(write, str(hash(numbers.clone().exp_().numpy().tobytes())).encode())
        os._exit(0)
    os.close(write)
    found.add(os.read(read, 100))
    os.close(read)
    os.wait()
print(len(found))
"""


def test_two_threads_do_not_race_in_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.stdout == "1\n", done.stderr
