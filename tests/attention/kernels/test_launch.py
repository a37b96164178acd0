"""What a prepared launch asks Triton for, and what it asks only once."""

from __future__ import annotations

import torch

from lightning_lighthouse.attention.kernels.launch import Launch


class Kernel:
    """Compiles, and counts it; what it compiled remembers the arguments of its last launch."""

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, num_warps):
            self.compiled.append((num_warps, Compiled(grid, arguments)))
            return self.compiled[-1][1]

        return compile_and_run


class Compiled:
    def __init__(self, grid, arguments):
        self.grid, self.arguments = grid, arguments

    def __getitem__(self, grid):
        assert grid == self.grid

        def run(*arguments):
            self.arguments = arguments

        return run


def test_a_kernel_is_compiled_once_for_each_dtype_and_alignment():
    kernel = Kernel()
    launch = Launch(kernel, 7, (5, 48), ("rule", True), 4)
    memory = torch.zeros(64)
    calls = [memory, torch.zeros(64), memory[1:], memory.double(), memory[4:], memory[3:]]
    for x in calls:
        launch(x, None, changing=(x.numel(),))
    assert [num_warps for num_warps, _ in kernel.compiled] == [4, 4, 4]
    last = [compiled.arguments for _, compiled in kernel.compiled]
    # the addresses of fp32 at 0 and 4, and at 1 and 3; doubles
    for arguments, x in zip(last, (calls[4], calls[5], calls[3]), strict=True):
        assert arguments[0] is x
        assert arguments[1:] == (None, x.numel(), 5, 48, "rule", True)


def test_what_the_interpreter_runs_is_not_kept():
    ran = []
    launch = Launch({(3, 1, 1): lambda *arguments, num_warps: ran.append(arguments)}, 3, (), (), 1)
    for _ in range(2):
        launch(torch.zeros(2))
    assert len(ran) == 2
    assert not launch.compiled
