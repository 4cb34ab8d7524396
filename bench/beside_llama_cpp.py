"""llama.cpp's files beside ours, in the table of bench/quantization.py.

    python bench/beside_llama_cpp.py CHECKPOINT WORK GGUF...

The same windows of the same text, the same tokens (compared), the same float32 original to differ from; the KV cache in
float32. Needs the package llama-cpp-python, and WORK/fp32.npy, which bench/quantization.py leaves behind. Rows bear the
names of the files and their folders.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from quantization import Bench, Reader, show

from llmc.runtime import Logits, Tokens

F32 = 0  # GGML_TYPE_F32


def reader(path: Path, windows: Sequence[Tokens]) -> Reader:
    model = llama_cpp.Llama(
        str(path),
        n_ctx=max(map(len, windows)),
        n_batch=max(map(len, windows)),
        logits_all=True,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )
    last = -1

    def read(index: int, rows: slice) -> Logits:
        nonlocal last
        if index != last:
            model.reset()
            model.eval(windows[index].tolist())
            last = index
        found: Logits = model.scores[rows]
        return np.array(found)

    # The window's end may lie within a word.
    first = windows[0].tolist()
    if model.tokenize(model.detokenize(first), add_bos=False, special=True)[:-4] != first[:-4]:
        raise SystemExit(f"{path} has another tokenizer")
    return read


def main(source: Path, work: Path, files: Sequence[Path]) -> None:
    bench = Bench(source, work)
    if "fp32" not in bench.rows:
        raise SystemExit(f"first: python bench/quantization.py {source} {work} rtn4-g32")
    for path in files:
        name = f"{path.parent.name}/{path.name}"
        if name not in bench.rows:
            made = {"bytes_after": path.stat().st_size}
            bench.add({name: (reader(path, bench.windows), made)})
    show(bench.rows, list(bench.texts))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
