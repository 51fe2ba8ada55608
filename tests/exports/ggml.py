"""ggml's own reader of GGUF and its own dequantization, called in its shared library."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

SIZE, COUNT, TEXT = ctypes.c_size_t, ctypes.c_int64, ctypes.c_char_p
POINTER = ctypes.c_void_p


class InitParameters(ctypes.Structure):
    """``gguf_init_params``"""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", POINTER)]


class TypeTraits(ctypes.Structure):
    """``ggml_type_traits``, up to what is needed"""

    _fields_ = [
        ("name", TEXT),
        ("block", COUNT),
        ("block_interleave", COUNT),
        ("size", SIZE),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, POINTER, POINTER, COUNT)),
    ]


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    declared = {
        "gguf_init_from_file": (POINTER, [TEXT, InitParameters]),
        "gguf_free": (None, [POINTER]),
        "gguf_get_n_tensors": (COUNT, [POINTER]),
        "gguf_get_data_offset": (SIZE, [POINTER]),
        "gguf_get_tensor_name": (TEXT, [POINTER, COUNT]),
        "gguf_get_tensor_type": (ctypes.c_int, [POINTER, COUNT]),
        "gguf_get_tensor_offset": (SIZE, [POINTER, COUNT]),
        "gguf_get_tensor_size": (SIZE, [POINTER, COUNT]),
        "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), [ctypes.c_int]),
    }
    for name, (result, arguments) in declared.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def quantized_tensors(path: Path) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
    """
    :return: of each quantized tensor its name, its type, and its numbers in one row: times the one
        number by which llama.cpp multiplies a product with it, if the file has one (NVFP4)
    """
    library = _library()
    context = library.gguf_init_from_file(str(path).encode(), InitParameters(True, None))
    if not context:
        raise ValueError(f"ggml does not read {path}")
    start = library.gguf_get_data_offset(context)
    file = np.memmap(path, dtype=np.uint8, mode="r")
    numbers = range(library.gguf_get_n_tensors(context))
    names = [library.gguf_get_tensor_name(context, number).decode() for number in numbers]

    def stored(number: int) -> NDArray[np.uint8]:
        first = start + library.gguf_get_tensor_offset(context, number)
        return np.array(file[first : first + library.gguf_get_tensor_size(context, number)])

    for number, name in zip(numbers, names, strict=True):
        traits = library.ggml_get_type_traits(library.gguf_get_tensor_type(context, number))[0]
        if not traits.quantized:
            continue
        blocks = stored(number)
        values = np.empty(len(blocks) // traits.size * traits.block, np.float32)
        traits.to_float(blocks.ctypes.data, values.ctypes.data, len(values))
        factor = name.removesuffix(".weight") + ".scale"
        if factor in names:
            values *= stored(names.index(factor)).view(np.float32)
        yield name, traits.name.decode(), values
    library.gguf_free(context)
