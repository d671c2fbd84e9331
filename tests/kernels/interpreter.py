"""Repairs of Triton's CPU interpreter (3.6 and 3.7), which computes some things otherwise than a GPU does.

`tl.dot` of bf16 operands multiplies their raw bits; float32 → bf16 truncates instead of rounding to the nearest even; the maximum of
NaN and a number is NaN, where a GPU's is the number; integer overflow checks take a third of the time; a scalar of 3.6 is an array of one
number, which numpy 2.5 no longer takes for an index. None of this is ours to fix in a kernel, so the tests fix it here.
"""

import dataclasses

import numpy as np


def repair() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired_by_red", False):
        return
    builder.repaired_by_red = True
    interpreter.interpreter_builder.options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

    dot, convert, patch = builder.create_dot, interpreter._convert_float, interpreter._patch_lang_tensor

    def create_dot(self, a, b, d, precision, max_imprecise):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, precision, max_imprecise)
        product = np.matmul(_widened(a, tl), _widened(b, tl), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def convert_float(values, source, target, rounding):
        if source == tl.bfloat16 and target == tl.float32:
            return values.astype(np.uint32) << 16
        if source == tl.float32 and target == tl.bfloat16:
            return _nearest_bf16(values)
        return convert(values, source, target, rounding)

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    builder.create_dot, interpreter._convert_float, interpreter._patch_lang_tensor = create_dot, convert_float, patch_tensor
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def _widened(handle, tl) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _nearest_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0), rounded)
