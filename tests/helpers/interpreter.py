"""Triton's interpreter without work that it repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_once_a_launch() -> None:
    """Let a launch patch `triton.language` once.

    The interpreter does so anew at each call of a function inside a kernel, a third of the time of our kernels. What it
    patches is the same every time, and stays patched until the launch ends. A Triton that is written otherwise is left
    as it is.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch = interpreter._patch_lang
    except (ImportError, AttributeError):
        return
    # the modules that the launch that is running has patched
    patched: list[Any] = []

    def patch_lang(fn: Callable[..., Any]) -> Any:
        missing = [
            module
            for module in (tl, tl.core)
            if module not in patched and any(value is module for value in fn.__globals__.values())
        ]
        if patched and not missing:
            # the interpreter lets the scope of a call inside a kernel fall
            return None
        is_launch = not patched
        scope = patch(fn)
        patched.extend(missing)
        if is_launch:
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang
