"""The caches of NFS' clients, by lines as /proc/self/mounts has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2m_hpc.storage.mounts import cached_seconds

MOUNTS = r"""
/dev/root / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
server:/a {0}/nfs nfs4 rw,relatime,vers=4.2,hard,proto=tcp,addr=10.0.0.1 0 0
server:/b {0}/nfs/long nfs rw,vers=3,acregmin=5,acregmax=10,acdirmax=300,hard 0 0
server:/c {0}/nfs/none nfs4 rw,vers=4.2,acregmax=60,noac 0 0
server:/d {0}/nfs/with\040space nfs4 rw,acregmax=3,acdirmax=3 0 0
old {0}/over nfs4 rw 0 0
lustre {0}/over lustre rw,flock 0 0
"""


@pytest.mark.parametrize(
    ("folder", "seconds"),
    [
        ("nfs/run/deep", 60),
        ("nfs/longer", 60),
        ("nfs/long/run", 300),
        ("nfs/none", 0),
        ("nfs/with space/x", 3),
        ("link/run", 60),
        ("over", 0),
        ("elsewhere", 0),
    ],
)
def test_the_longest_mount_above_a_folder_tells(
    tmp_path: Path, folder: str, seconds: float
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nfs")
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS.strip().format(tmp_path))
    assert cached_seconds(tmp_path / folder, mounts) == seconds


def test_this_machine_tells_or_has_none(tmp_path: Path) -> None:
    assert cached_seconds(tmp_path) >= 0
    assert cached_seconds(tmp_path, tmp_path / "none") == 0
