"""What of the host's memory can still be had."""

import psutil

from finetune.memory.free_memory import free_host_memory

GB = 1_000_000_000


def group(folder, limit, used, files):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - files}\nfile {files}\ninactive_file {files}\n")
    return folder


def test_a_container_has_its_limit(tmp_path, monkeypatch):
    available = type("Memory", (), {"available": 50 * GB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    assert free_host_memory(group(tmp_path, 8 * GB, 3 * GB, 1 * GB)) == 6 * GB
    assert free_host_memory(group(tmp_path, 80 * GB, 3 * GB, 1 * GB)) == 50 * GB
    assert free_host_memory(group(tmp_path, 2 * GB, 3 * GB, 0)) == 0
    assert free_host_memory(group(tmp_path, "max", 3 * GB, 0)) == 50 * GB
    assert free_host_memory(tmp_path / "none") == 50 * GB
