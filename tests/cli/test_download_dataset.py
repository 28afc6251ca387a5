"""data/download_dataset.sh against a server and archives of the tests' own."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(tarfile, "data_filter"), reason="Python before 3.11.4 unpacks archives without a look at their paths"
)

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "download_dataset.sh"
DEFAULT_TASKS = [
    *("SST-2", "sst-5", "mr", "cr", "mpqa", "subj", "trec"),
    *("CoLA", "MRPC", "QQP", "STS-B", "MNLI", "SNLI", "QNLI", "RTE"),
]

# Rows of the real data sets; what stands in the rows does not matter to the script.
ROWS = {
    **{"SST-2/train.tsv": 6_920, "SST-2/dev.tsv": 872, "GLUE-SST-2/train.tsv": 67_350, "GLUE-SST-2/dev.tsv": 873},
    **{"sst-5/train.csv": 8_544, "sst-5/test.csv": 2_210, "mr/train.csv": 8_662, "mr/test.csv": 2_000},
    **{"cr/train.csv": 1_775, "cr/test.csv": 2_000, "mpqa/train.csv": 8_606, "mpqa/test.csv": 2_000},
    **{"subj/train.csv": 8_000, "subj/test.csv": 2_000, "trec/train.csv": 5_452, "trec/test.csv": 500},
    **{"CoLA/train.tsv": 8_551, "CoLA/dev.tsv": 1_043, "MRPC/train.tsv": 3_669, "MRPC/dev.tsv": 409},
    **{"QQP/train.tsv": 363_850, "QQP/dev.tsv": 40_431, "STS-B/train.tsv": 5_750, "STS-B/dev.tsv": 1_501},
    **{"MNLI/train.tsv": 392_703, "MNLI/dev_matched.tsv": 9_816, "MNLI/dev_mismatched.tsv": 9_833},
    **{"SNLI/train.tsv": 549_368, "SNLI/dev.tsv": 9_843, "QNLI/train.tsv": 104_744, "QNLI/dev.tsv": 5_464},
    **{"RTE/train.tsv": 2_491, "RTE/dev.tsv": 278},
}

# What the archive's script is taken to do: split the whole set, with 1000 examples of each class for testing.
PROCESS = """
rows = open("all.csv").read().splitlines(keepends=True)
test = [row for label in "01" for row in [row for row in rows if row.startswith(label)][:1000]]
open("test.csv", "w").writelines(test)
open("train.csv", "w").writelines(row for row in rows if row not in set(test))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder that the archive is made of."""
    root = tmp_path_factory.mktemp("source")
    for name, rows in ROWS.items():
        path = root / "original" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name[0]}\n" * rows)
    (root / "original/cr/all.csv").write_text("".join(f"{number % 2},review {number}\n" for number in range(3_775)))
    (root / "original/cr/process.py").write_text(PROCESS)
    return root


def pack(folder, archive):
    with tarfile.open(archive, "w") as members:
        members.add(folder / "original", "original")


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "datasets.tar"
    pack(source, path)
    return path


class Server:
    """Serves one file, in parts where it is asked to and can; remembers the ranges it was asked for."""

    def __init__(self, path, ranges=True):
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                content = path.read_bytes()
                asked.append(self.headers["Range"])
                start = 0
                if ranges and self.headers["Range"]:
                    start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start:])

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/datasets.tar"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(*arguments, **keywords):
        servers.append(Server(*arguments, **keywords))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def data(tmp_path):
    """A copy of the script in a data folder of its own."""
    folder = tmp_path / "a project" / "data"
    folder.mkdir(parents=True)
    shutil.copy(SCRIPT, folder)
    return folder


def run(data, cwd="/", path=None, **variables):
    environment = {"PATH": path or os.environ["PATH"], "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["/bin/bash", str(data / SCRIPT.name)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(params=["curl", "wget"])
def path(request, tmp_path):
    """A search path with one of the two clients and little else."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in (request.param, "grep", "sed", "mv", "rm", "mktemp", "mkdir", "tail", "basename", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    return str(tools)


def closed_port():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_port}/datasets.tar"


def only(data, *names):
    """What lies in the data folder, hidden files included, is the script and these."""
    return {path.name for path in data.iterdir()} == {SCRIPT.name, *names}


def test_it_fetches_unpacks_takes_glues_sst2_and_splits_cr_anew(data, archive, serve, path):
    done = run(data, path=path, DATASETS_URL=serve(archive).url)
    assert done.returncode == 0, done.stderr
    original = data / "original"
    assert {folder.name for folder in original.iterdir()} == {*DEFAULT_TASKS, "SST-2-original"}
    assert (original / "SST-2" / "train.tsv").read_text() == "G\n" * 67_350
    assert (original / "SST-2-original" / "train.tsv").read_text() == "S\n" * 6_920
    assert (original / "MNLI" / "dev_mismatched.tsv").read_text() == "M\n" * 9_833
    test = (original / "cr" / "test.csv").read_text().splitlines()
    assert Counter(row[0] for row in test) == {"0": 250, "1": 250}
    train = (original / "cr" / "train.csv").read_text().splitlines()
    assert len(train) == 3_275
    assert not set(train) & set(test)
    assert only(data, "original", "datasets.tar")


def test_a_second_run_needs_no_network_and_changes_nothing(data, archive, serve):
    assert run(data, DATASETS_URL=serve(archive).url).returncode == 0
    (data / "datasets.tar").unlink()
    before = {path: path.stat().st_mtime_ns for path in (data / "original").rglob("*")}
    done = run(data, DATASETS_URL=closed_port())
    assert (done.returncode, done.stdout) == (0, f"all data sets are in {data}/original\n")
    assert {path: path.stat().st_mtime_ns for path in (data / "original").rglob("*")} == before


def test_folders_that_are_there_stay_and_missing_ones_are_added(data, archive, source):
    shutil.copy(archive, data)
    for task in ("RTE", "mr"):
        shutil.copytree(source / "original" / task, data / "original" / task)
    (data / "original" / "RTE" / "notes.txt").write_text("mine")
    done = run(data, DATASETS_URL=closed_port())
    assert done.returncode == 0
    assert (data / "original" / "RTE" / "notes.txt").read_text() == "mine"
    added = ", ".join(task for task in DEFAULT_TASKS if task not in ("RTE", "mr"))
    assert done.stdout.splitlines()[-1].startswith(f"{added}: now in {data}/original; ")


def test_a_folder_that_is_there_but_not_complete_is_told(data, source):
    shutil.copytree(source / "original" / "cr", data / "original" / "cr")
    done = run(data, DATASETS_URL=closed_port())
    assert done.returncode == 1
    assert done.stderr == (
        f"error: in {data}/original, cr/train.csv has 1775 rows, fewer than 3000: "
        "move the folder cr away and run this again\n"
    )


def test_without_a_network_it_says_so_in_one_sentence(data, path):
    url = closed_port()
    done = run(data, path=path, DATASETS_URL=url)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: cannot fetch {url}, is there a network? With the archive from elsewhere as {data}/datasets.tar, "
        "run this again\n"
    )
    assert only(data)


def test_an_interrupted_download_goes_on_where_it_stopped(data, archive, serve, path):
    content = archive.read_bytes()
    (data / "datasets.tar.part").write_bytes(content[:5000])
    server = serve(archive)
    assert run(data, path=path, DATASETS_URL=server.url).returncode == 0
    assert server.asked == ["bytes=5000-"]
    assert (data / "datasets.tar").read_bytes() == content


@pytest.mark.parametrize("ranges", [True, False])
def test_what_cannot_be_gone_on_with_is_fetched_afresh(data, archive, serve, path, ranges):
    content = archive.read_bytes()
    # Where the server can send parts, there is no part behind the end of a download that was complete.
    (data / "datasets.tar.part").write_bytes(content if ranges else content[:5000])
    assert run(data, path=path, DATASETS_URL=serve(archive, ranges=ranges).url).returncode == 0
    assert (data / "datasets.tar").read_bytes() == content
    assert only(data, "original", "datasets.tar")


def test_a_part_that_was_fetched_outlives_a_run_without_a_network(data):
    (data / "datasets.tar.part").write_bytes(b"begun")
    assert run(data, DATASETS_URL=closed_port()).returncode == 1
    assert (data / "datasets.tar.part").read_bytes() == b"begun"


def test_a_truncated_archive_is_told_and_leaves_no_data_sets(data, archive):
    (data / "datasets.tar").write_bytes(archive.read_bytes()[:3_000_000])
    done = run(data, DATASETS_URL=closed_port())
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {data}/datasets.tar is damaged (")
    assert done.stderr.count("\n") == 1
    assert only(data, "datasets.tar")


def test_an_archive_that_reaches_outside_its_folder_is_refused(data, tmp_path):
    (tmp_path / "evil").write_text("evil")
    with tarfile.open(data / "datasets.tar", "w") as members:
        members.add(tmp_path / "evil", "../../escaped")
    done = run(data, DATASETS_URL=closed_port())
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {data}/datasets.tar is not the archive of the data sets: ")
    assert not list(tmp_path.rglob("escaped"))
    assert only(data, "datasets.tar")


def test_an_archive_that_lacks_rows_is_told_and_leaves_no_data_sets(data, source, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    (tmp_path / "copy" / "original" / "QNLI" / "dev.tsv").write_text("x\n" * 12)
    pack(tmp_path / "copy", data / "datasets.tar")
    done = run(data, DATASETS_URL=closed_port())
    assert done.returncode == 1
    assert (
        "error: " + f"{data}/datasets.tar is not complete: QNLI/dev.tsv has 12 rows, fewer than 5300\n" == done.stderr
    )
    assert only(data, "datasets.tar")


def test_a_script_for_cr_that_fails_is_told(data, source, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    (tmp_path / "copy/original/cr/process.py").write_text("raise SystemExit('no more than 1000')")
    pack(tmp_path / "copy", data / "datasets.tar")
    done = run(data, DATASETS_URL=closed_port())
    assert (done.returncode, done.stderr) == (1, "error: splitting cr anew failed: no more than 250\n")
    assert only(data, "datasets.tar")


def test_a_checksum_that_is_given_must_fit(data, archive):
    shutil.copy(archive, data)
    done = run(data, DATASETS_URL=closed_port(), DATASETS_SHA256="0" * 64)
    assert done.returncode == 1
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert done.stderr.startswith(f"error: {data}/datasets.tar has the SHA-256 {found}, not {'0' * 64} as ")
    assert run(data, DATASETS_URL=closed_port(), DATASETS_SHA256=found).returncode == 0


def test_files_that_differ_from_those_of_the_published_splits_are_told(data, archive):
    shutil.copy(archive, data)
    done = run(data, DATASETS_URL=closed_port())
    told = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert told == [
        *("CoLA/dev.tsv", "MRPC/dev.tsv", "QQP/dev.tsv", "STS-B/dev.tsv", "MNLI/dev_matched.tsv"),
        *("MNLI/dev_mismatched.tsv", "SNLI/dev.tsv", "QNLI/dev.tsv", "RTE/dev.tsv"),
    ]
