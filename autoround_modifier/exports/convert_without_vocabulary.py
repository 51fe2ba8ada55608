"""
A program that runs llama.cpp's converter without its vocabulary, of which it does not know all
tokenizers:

    python convert_without_vocabulary.py convert_hf_to_gguf.py MODEL [OPTIONS]

It takes the converter's arguments. It is a program, because the converter changes ``sys.path``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    converter = runpy.run_path(str(script))
    base = converter["ModelBase"]
    prepare_metadata = base.prepare_metadata

    def without_vocabulary(self: Any, *arguments: Any, **options: Any) -> None:
        self.set_vocab = lambda: None
        prepare_metadata(self, *arguments, **options)

    base.prepare_metadata = without_vocabulary
    converter["main"]()


if __name__ == "__main__":
    main()
