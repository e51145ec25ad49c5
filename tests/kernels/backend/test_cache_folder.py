"""What later processes read again may be nobody else's."""

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from spectrumkv_kernels.backend import cache_folder
from spectrumkv_kernels.backend.cache_folder import Untrusted, location, opened

ROOT = os.geteuid() == 0
STRANGER = 54321
as_root = pytest.mark.skipif(not ROOT, reason="only root can give files to another user")


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def open_place():
    """A folder that every user can reach, which those of pytest are not."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@contextlib.contextmanager
def user(uid):
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def write(data=b"data", name="file", kind="some"):
    with opened(kind) as folder:
        folder.write(name, data)
    return location(kind) / name


def read(name="file", kind="some"):
    with opened(kind, create=False) as folder:
        return folder.read(name)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


class TestLocation:
    @pytest.mark.parametrize("value", [None, "", "relative/path", ".", "~/cache"])
    def test_only_an_absolute_path_counts(self, value, monkeypatch, tmp_path):
        """A relative one would lead into the working directory, and so somewhere else each time."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/somebody")
        monkeypatch.delenv("XDG_CACHE_HOME") if value is None else monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert str(location("some")) == "/home/somebody/.cache/spectrumkv/some"

    def test_the_variable(self, base):
        assert location("some") == base / "spectrumkv" / "some"

    def test_without_home_the_user_database_tells(self, monkeypatch):
        import pwd

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir="/home/known"))
        assert location("some") == Path("/home/known/.cache/spectrumkv/some")
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
        with pytest.raises(OSError, match="XDG_CACHE_HOME or HOME"):
            location("some")

    @pytest.mark.parametrize("home", ["somewhere", "."])
    def test_a_relative_home(self, home, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", home)
        with pytest.raises(OSError, match="no absolute path"), opened("some"):
            pass


def test_a_round_trip_and_the_modes(base):
    before = os.umask(0)
    try:
        path = write()
    finally:
        os.umask(before)
    assert read() == b"data" and path.read_bytes() == b"data"
    assert [mode(p) for p in (path, path.parent, path.parent.parent, base)] == [0o600, 0o700, 0o700, 0o700]
    write(b"other")
    assert read() == b"other" and [p.name for p in path.parent.iterdir()] == ["file"]
    with opened("some") as folder:
        assert folder.names() == ["file"]
        folder.remove("file")
        folder.remove("file")
        assert folder.names() == []
    with pytest.raises(FileNotFoundError):
        read()


def test_nothing_is_made_for_a_reader(base):
    with pytest.raises(FileNotFoundError, match=str(base)):
        read()
    assert not base.exists()


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o720, 0o702, 0o777, 0o1777])
@pytest.mark.parametrize("which", ["file", "kind", "all"])
def test_what_others_may_write(bits, which):
    path = write()
    changed = {"file": path, "kind": path.parent, "all": path.parent.parent}[which]
    changed.chmod(bits)
    with pytest.raises(Untrusted, match=f"may write {changed} .*chmod go-w"):
        read()
    if which != "file":
        with pytest.raises(Untrusted, match="may write"):
            write()
    assert path.read_bytes() == b"data" and mode(changed) == bits
    changed.chmod(bits & ~0o22)
    assert read() == b"data"


@as_root
@pytest.mark.parametrize("which", ["file", "kind", "all"])
def test_what_belongs_to_another_user(which):
    path = write()
    changed = {"file": path, "kind": path.parent, "all": path.parent.parent}[which]
    os.chown(changed, STRANGER, -1)
    with pytest.raises(Untrusted, match=f"{changed} belongs to user {STRANGER}"):
        read()
    if which != "file":
        with pytest.raises(Untrusted, match="belongs to"):
            write()
    assert path.read_bytes() == b"data"


@pytest.mark.parametrize("which", ["file", "kind", "all"])
def test_links_inside_the_folder(which, tmp_path):
    path = write()
    changed = {"file": path, "kind": path.parent, "all": path.parent.parent}[which]
    changed.rename(tmp_path / "elsewhere")
    changed.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        read()
    if which == "file":
        write(b"own")
        assert read() == b"own" and (tmp_path / "elsewhere").read_bytes() == b"data"
    else:
        with pytest.raises(Untrusted, match=f"{changed} is a symbolic link"):
            write()


def test_links_above_the_folder(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "home").symlink_to("real")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write()
    assert (tmp_path / "real" / ".cache" / "spectrumkv" / "some" / "file").read_bytes() == b"data" == read()


def test_a_link_above_that_leads_nowhere(base, tmp_path):
    base.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=str(base)):
        write()


def test_a_link_to_another_file_system(base):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(base.parent).st_dev:
        pytest.skip("there is no other file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        base.symlink_to(place)
        write()
        assert read() == b"data"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_what_is_no_file(make):
    make(write().with_name("other"))
    with pytest.raises(Untrusted, match="some/other is something else than a file"):
        read("other")


def test_a_file_in_the_place_of_a_folder(base):
    base.write_text("")
    with pytest.raises(NotADirectoryError, match=str(base)):
        write()
    base.unlink()
    base.mkdir()
    (base / "spectrumkv").write_text("")
    with pytest.raises(NotADirectoryError, match=str(base / "spectrumkv")):
        write()


def test_a_folder_for_everybody(base):
    """As /tmp: its sticky bit lets nobody touch what others have made there."""
    base.mkdir()
    base.chmod(0o1777)
    write()
    assert read() == b"data"


@as_root
def test_a_name_that_somebody_else_has_occupied(open_place, monkeypatch):
    open_place.chmod(0o1777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(open_place))
    with user(STRANGER):
        write(b"stranger's")
        (open_place / "spectrumkv").chmod(0o755)
    for act in (write, read):
        with pytest.raises(Untrusted, match=f"belongs to user {STRANGER}"):
            act()
    with user(STRANGER):
        assert read() == b"stranger's"


@as_root
def test_root_with_another_users_home(open_place, monkeypatch):
    """As `sudo` leaves it: nothing is put there that the user could neither use nor remove."""
    os.chown(open_place, STRANGER, -1)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(open_place))
    with pytest.raises(Untrusted, match=f"{open_place} belongs to user {STRANGER}"):
        write()
    assert not list(open_place.iterdir())
    with user(STRANGER):
        write()
        assert read() == b"data"
    for act in (write, read):
        with pytest.raises(Untrusted, match="belongs to user"):
            act()


@as_root
def test_a_home_that_can_not_be_written(open_place, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(open_place))
    with user(STRANGER):
        with pytest.raises(PermissionError, match=str(open_place)):
            write()
        with pytest.raises(FileNotFoundError):
            read()


def test_a_folder_that_is_exchanged_while_it_is_open(base, tmp_path):
    path = write()
    with opened("some") as folder:
        path.parent.rename(tmp_path / "gone")
        path.parent.mkdir()
        path.write_bytes(b"planted")
        assert folder.read("file") == b"data"
        if os.path.isdir("/proc/self/fd"):
            assert Path(folder.path_of("file")).read_bytes() == b"data"
        folder.write("new", b"new")
    assert (tmp_path / "gone" / "new").read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(failing, monkeypatch):
    path = write()

    def fail(*_, **__):
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="full"):
            write(b"new")
    assert [p.name for p in path.parent.iterdir()] == ["file"] and read() == b"data"


def test_data_is_on_disk_before_it_has_its_name(monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_size), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *a, **k: (done.append("named"), replace(*a, **k)))
    write(b"12345")
    assert done[:2] == [5, "named"] and len(done) == 3  # and then the folder


def test_a_system_without_owners(monkeypatch):
    monkeypatch.delattr(os, "geteuid")
    with pytest.raises(OSError, match="no owners"), opened("some"):
        pass
    assert cache_folder.location("some")
