"""Write ../sha256.json, against which stage fetch checks every file. Run it after any change to the folder."""

from __future__ import annotations

import json
from pathlib import Path

from qvgen.models.files import RECORD
from qvgen.models.hashes import hash_files
from qvgen.models.source import read_pipeline

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    hashes = {name: file.sha256 for name, file in hash_files(HERE, read_pipeline(HERE).files).items()}
    (HERE / RECORD).write_text(json.dumps(hashes, indent=2) + "\n")


if __name__ == "__main__":
    main()
