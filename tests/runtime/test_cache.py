"""The folder of compiled kernels: what is loaded from it, what is made anew, and which folders are refused."""

import grp
import os
import pwd
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import cupaged as pg
from cupaged.runtime import cache
from cupaged.runtime.cache import cache_folder, cached_file

CONTENT = bytes(range(256)) * 16
SOMEBODY = 12345


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The cache's folder, not made yet."""
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made():
    """What `kept` had to make."""
    return []


@pytest.fixture
def kept(folder, made):
    """Ask the cache for a file of CONTENT."""

    def make(work):
        made.append(work)
        return CONTENT

    return lambda: cached_file("host", "kernel-0123", ".so", make)


@pytest.fixture
def give_away(monkeypatch):
    """Give a file or folder to somebody else; only in what the system answers, for a user who may not."""
    held = []

    def give(path):
        if os.geteuid() == 0:
            os.chown(path, SOMEBODY, SOMEBODY)
            return
        held.append(os.open(path, os.O_RDONLY))  # no other file gets its number meanwhile
        given = os.stat(path)
        for name in ("stat", "fstat"):
            monkeypatch.setattr(os, name, answering_for(given, getattr(os, name)))

    def answering_for(given, ask):
        def answer(*args, **options):
            status = ask(*args, **options)
            if (status.st_dev, status.st_ino) != (given.st_dev, given.st_ino):
                return status
            return os.stat_result((*status[:4], SOMEBODY, SOMEBODY, *status[6:]))

        return answer

    yield give
    for descriptor in held:
        os.close(descriptor)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def replace(path, content):
    """Put another file in the place of one that may be loaded."""
    other = path.with_name("other")
    other.write_bytes(content)
    other.chmod(0o600)
    os.replace(other, path)


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_is_made_once(kept, made):
    first, second = kept(), kept()
    assert first == second and first.read_bytes() == CONTENT and len(made) == 1
    assert not made[0].exists()


@pytest.mark.parametrize(
    "damaged",
    [b"", CONTENT[:100], CONTENT[:-1], CONTENT + b"\0", bytes(len(CONTENT)), b"\1" + CONTENT[1:]],
    ids=["empty", "cut", "one byte less", "one byte more", "zeros", "one byte other"],
)
def test_a_damaged_file_is_made_anew_once(damaged, kept, made):
    replace(kept(), damaged)
    for _ in range(2):
        assert kept().read_bytes() == CONTENT
    assert len(made) == 2


@pytest.mark.parametrize("rights", [0o777, 0o622, 0o620, 0o602])
def test_a_file_that_others_may_write_is_made_anew(rights, kept, made):
    kept().chmod(rights)
    path = kept()
    assert len(made) == 2 and mode(path) == 0o600


def test_a_file_of_somebody_else_is_made_anew(kept, made, give_away):
    give_away(kept())
    path = kept()
    assert len(made) == 2 and path.stat().st_uid == os.geteuid()


def test_a_link_is_not_followed(kept, made, tmp_path):
    path = kept()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert not kept().is_symlink() and len(made) == 2
    assert (tmp_path / "elsewhere").read_bytes() == CONTENT


def test_a_pipe_is_not_waited_for(kept, made):
    path = kept()
    path.unlink()
    os.mkfifo(path, 0o600)
    assert kept().read_bytes() == CONTENT and len(made) == 2


def test_an_empty_folder_in_the_place_of_a_file_makes_room(kept, made):
    path = kept()
    path.unlink()
    path.mkdir()
    for _ in range(2):
        assert kept().read_bytes() == CONTENT
    assert len(made) == 2


def test_a_folder_in_the_place_of_a_file_is_one_sentence_before_anything_is_made(kept, made):
    path = kept()
    path.unlink()
    (path / "held").mkdir(parents=True)
    with pytest.raises(pg.KernelBuildError) as error:
        kept()
    said = str(error.value)
    assert (
        f"cannot be kept in {path}, as that is a folder" in said
        and "CUPAGED_CACHE_DIR" in said
        and "building-" not in said
    )
    assert len(made) == 1 and (path / "held").is_dir()


def test_a_sound_file_is_loaded_whatever_lies_beside_it(kept, made):
    path = kept()
    (path.with_name(f"kernel-0123-{'0' * cache.DIGEST_LENGTH}.so") / "held").mkdir(parents=True)
    assert kept() == path and len(made) == 1


def test_a_link_to_a_folder_in_the_place_of_a_file_is_removed_alone(kept, made, tmp_path):
    path = kept()
    path.unlink()
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    assert kept().read_bytes() == CONTENT and not path.is_symlink() and (tmp_path / "elsewhere").is_dir()


def test_files_and_folders_are_for_the_user_alone_under_any_umask(kept, folder, monkeypatch):
    deeper = folder / "a" / "b"
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(deeper))
    before = os.umask(0)
    try:
        path = kept()
    finally:
        os.umask(before)
    assert {mode(part) for part in (folder, folder / "a", deeper, deeper / "host")} == {0o700}
    assert mode(path) == 0o600


def test_two_at_once_both_get_a_sound_file(folder):
    together, got = threading.Barrier(2, timeout=60), []

    def make(work):
        together.wait()
        return CONTENT

    def ask():
        got.append(cached_file("host", "kernel", ".so", make))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2 and all(path.read_bytes() == CONTENT for path in got)
    assert cached_file("host", "kernel", ".so", lambda work: pytest.fail("made again")) in got
    assert [path.name for path in (folder / "host").iterdir()] == [got[0].name]


def test_two_that_are_made_differently_are_both_good(folder):
    """As by a compiler that notes the time: whoever comes later takes one of them."""
    inner = []

    def make(work):
        inner.append(cached_file("host", "kernel", ".so", lambda work: b"first"))
        return b"second"

    outer = cached_file("host", "kernel", ".so", make)
    assert (outer.read_bytes(), inner[0].read_bytes()) == (b"second", b"first")
    assert cached_file("host", "kernel", ".so", lambda work: pytest.fail("made again")) in (outer, inner[0])


def test_a_longer_name_is_another_file(folder):
    long = cached_file("host", "kernel-01", ".so", lambda work: b"long")
    short = cached_file("host", "kernel", ".so", lambda work: b"short")
    assert (long.read_bytes(), short.read_bytes()) == (b"long", b"short")


def test_no_room_is_one_sentence_and_leaves_nothing(kept, folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(
            pg.KernelBuildError, match=r"cannot be kept in .*File too large.*CUPAGED_CACHE_DIR"
        ) as error:
            kept()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert list((folder / "host").iterdir()) == []
    assert kept().read_bytes() == CONTENT


def test_what_cannot_be_made_leaves_nothing(folder):
    def make(work):
        (work / "half").write_bytes(CONTENT)
        raise pg.KernelBuildError("a mistake in line 7")

    with pytest.raises(pg.KernelBuildError, match="a mistake in line 7"):
        cached_file("host", "kernel", ".so", make)
    assert list((folder / "host").iterdir()) == []


KILLED = """
import os, signal
from cupaged.runtime.cache import cached_file
def make(work):
    (work / "half").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
cached_file("host", "kernel-0123", ".so", make)
"""


def test_what_a_killed_build_left_is_neither_loaded_nor_kept_for_ever(kept, folder):
    root = Path(cache.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", KILLED], cwd=root, env={**os.environ}).returncode == -9
    (left,) = (folder / "host").iterdir()
    path = kept()
    assert path.read_bytes() == CONTENT and left.exists()  # somebody may be at work in it
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(left, (long_ago, long_ago))
    path.unlink()
    again = kept()
    assert list((folder / "host").iterdir()) == [again]


def test_a_folder_that_was_removed_is_made_again(kept, folder, made):
    kept()
    shutil.rmtree(folder)
    assert kept().read_bytes() == CONTENT and len(made) == 2


def test_sound_files_of_a_folder_that_cannot_be_written_are_loaded(kept, monkeypatch):
    path = kept()
    monkeypatch.setattr(cache.tempfile, "TemporaryDirectory", lambda **options: pytest.fail("the folder was written"))
    assert kept() == path


# --- which folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home, and no variable that names another place."""
    for name in ("CUPAGED_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_it_lies_in_the_home(home):
    assert cache_folder("host") == home / ".cache" / "cupaged" / "host"
    assert mode(home) == mode(home / ".cache") == 0o700


@pytest.mark.parametrize("relative", ["", "cache", "./cache", "../cache", "~/cache"])
def test_a_relative_xdg_cache_home_is_ignored(relative, home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    assert cache_folder("host") == home / ".cache" / "cupaged" / "host"


def test_an_absolute_xdg_cache_home_is_followed(home, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("cuda") == tmp_path / "xdg" / "cupaged" / "cuda"
    assert not home.exists()


@pytest.mark.parametrize(
    ("named", "expected"),
    [("", "home/.cache/cupaged"), ("~/kernels", "home/kernels"), ("~", "home"), ("here", "here"), ("../{}/x", "x")],
)
def test_what_the_variable_may_say(named, expected, home, monkeypatch, tmp_path):
    monkeypatch.setenv("CUPAGED_CACHE_DIR", named.format(tmp_path.name))
    assert cache_folder("host") == tmp_path / expected / "host"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("unset", [None, ""])
def test_without_home_the_list_of_users_says_where(unset, home, monkeypatch, tmp_path):
    monkeypatch.delenv("HOME") if unset is None else monkeypatch.setenv("HOME", unset)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="me", pw_dir=str(tmp_path / "listed")))
    assert cache_folder("host") == tmp_path / "listed" / ".cache" / "cupaged" / "host"


@pytest.mark.parametrize("value", [None, "", "relative"])
def test_no_home_is_one_sentence(value, home, monkeypatch):
    monkeypatch.delenv("HOME") if value is None else monkeypatch.setenv("HOME", value)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(pg.KernelBuildError, match=f"no home folder .*HOME is {value!r}.*CUPAGED_CACHE_DIR name"):
        cache_folder("host")


def test_links_are_followed_to_a_folder_of_the_users_own(folder, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "real")
    assert cache_folder("host") == tmp_path / "real" / "host"


# --- folders that are refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("file", r"Not a directory: .*/file\)"),
        ("file/below", r"Not a directory: .*/file\)"),
        ("loop", "File exists|symbolic links"),
        ("loop/below", "File exists|symbolic links"),
        ("dangling", "No such file or directory: /proc/cupaged"),
        ("x" * 300, "name too long"),
        ("/proc/cupaged", "No such file"),
        ("~nobody-of-this-name/x", "home directory"),
    ],
)
def test_a_folder_that_cannot_be_is_one_sentence(named, reason, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("/proc/cupaged")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUPAGED_CACHE_DIR", named)
    with pytest.raises(pg.KernelBuildError, match=reason) as error:
        cache_folder("host")
    assert "CUPAGED_CACHE_DIR" in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "loop"]


@pytest.mark.parametrize("part", [".", "host"])
def test_a_folder_of_somebody_else_is_refused(part, folder, give_away):
    cache_folder("host")
    give_away(folder / part)
    with pytest.raises(PermissionError, match=f"must belong to the user .* owner {SOMEBODY} .*CUPAGED_CACHE_DIR"):
        cache_folder("host")


@pytest.mark.parametrize("part", [".", "host"])
@pytest.mark.parametrize("rights", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_is_refused(part, rights, folder):
    cache_folder("host")
    (folder / part).chmod(rights)
    with pytest.raises(PermissionError, match=f"writable by nobody else .* mode {rights:o}.*CUPAGED_CACHE_DIR"):
        cache_folder("host")


@pytest.fixture
def above(monkeypatch, tmp_path):
    """A folder two levels above the cache's."""
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "above" / "own" / "cache"))
    (tmp_path / "above").mkdir(mode=0o700)
    return tmp_path / "above"


@pytest.mark.parametrize("rights", [0o777, 0o702])
def test_a_folder_that_others_may_put_another_in_the_place_of_is_refused(rights, above):
    above.chmod(rights)
    with pytest.raises(PermissionError, match=f"another one in its place, but {above} has .* mode {rights:o}"):
        cache_folder("host")
    above.chmod(rights | stat.S_ISVTX)  # as /tmp: everybody may write, nobody may rename what is another's
    assert cache_folder("host").is_dir()


def test_a_folder_in_one_of_somebody_else_is_refused(above, give_away):
    cache_folder("host")
    give_away(above)
    with pytest.raises(PermissionError, match=f"{above} has owner {SOMEBODY} .*CUPAGED_CACHE_DIR"):
        cache_folder("host")


@pytest.mark.parametrize(
    ("group", "members", "accepted"),
    [("me", [], True), ("me", ["me"], True), ("me", ["me", "you"], False), ("users", [], False)],
)
def test_a_group_may_write_above_only_if_it_is_the_users_alone(group, members, accepted, above, monkeypatch):
    above.chmod(0o770)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=group, gr_mem=members))
    if accepted:
        assert cache_folder("host").is_dir()
    else:
        with pytest.raises(PermissionError, match=f"{above} has .* mode 770"):
            cache_folder("host")
