"""SHA-256 of what results are made from. Of Python's standard library alone."""

import hashlib
from pathlib import Path


def digest(path):
    """Of a file, however large; of a folder, of the names and digests of all files below."""
    sha256 = hashlib.sha256()
    path = Path(path)
    if path.is_dir():
        for file in sorted(part for part in path.rglob("*") if part.is_file()):
            sha256.update(f"{file.relative_to(path)} {digest(file)}\n".encode())
        return sha256.hexdigest()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            sha256.update(chunk)
    return sha256.hexdigest()
