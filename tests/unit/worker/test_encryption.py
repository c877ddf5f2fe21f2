from pathlib import Path

import pyrage

from selfloop.types.digests import MANIFEST_FILE
from selfloop.worker.serving.encryption import encrypt_folder


def test_every_file_is_sealed_for_each_recipient(tmp_path: Path):
    """Nothing is left readable, and any of the keys opens everything."""
    contents = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 1000, "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    keys = [pyrage.x25519.Identity.generate() for _ in range(2)]
    size_bytes = encrypt_folder(tmp_path, [str(key.to_public()) for key in keys])
    sealed = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # The digests of what is sealed, which anybody may read.
    assert MANIFEST_FILE in sealed
    del sealed[MANIFEST_FILE]
    assert set(sealed) == {f"{name}.age" for name in contents}
    assert size_bytes == sum(map(len, sealed.values()))
    for name, content in contents.items():
        for key in keys:
            assert pyrage.decrypt(sealed[f"{name}.age"], [key]) == content
