#!/usr/bin/env bash
# Fetch the original data sets into the folder original/ beside this script: LM-BFF's public archive, with GLUE's SST-2
# in place of the sentence-level one and `cr` split anew so that 500 examples are for testing.
#
# Folders that are there already stay as they are, so it can be run again at any time; an interrupted download goes on
# where it stopped. Without a network, put the archive beside this script as datasets.tar.
#
#   DATASETS_URL     another place to get the archive from
#   DATASETS_SHA256  the checksum that the archive must have (its publishers name none)
#   PYTHON           the interpreter that unpacks it (default: the project's .venv, else python3)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
url=${DATASETS_URL:-https://nlp.cs.princeton.edu/projects/lm-bff/datasets.tar}
archive=$here/datasets.tar
originals=$here/original
staging=

tasks="SST-2 sst-5 mr cr mpqa subj trec CoLA MRPC QQP STS-B MNLI SNLI QNLI RTE"

# The files that must be there, with the fewest and, where it matters, the most rows that are plausible.
expected_rows="
SST-2/train.tsv 65000
SST-2/dev.tsv 800
sst-5/train.csv 8000
sst-5/test.csv 2000
mr/train.csv 8000
mr/test.csv 1900
cr/train.csv 3000
cr/test.csv 500 500
mpqa/train.csv 8000
mpqa/test.csv 1900
subj/train.csv 7500
subj/test.csv 1900
trec/train.csv 5000
trec/test.csv 480
CoLA/train.tsv 8000
CoLA/dev.tsv 1000
MRPC/train.tsv 3500
MRPC/dev.tsv 400
QQP/train.tsv 350000
QQP/dev.tsv 38000
STS-B/train.tsv 5500
STS-B/dev.tsv 1400
MNLI/train.tsv 380000
MNLI/dev_matched.tsv 9500
MNLI/dev_mismatched.tsv 9500
SNLI/train.tsv 530000
SNLI/dev.tsv 9500
QNLI/train.tsv 100000
QNLI/dev.tsv 5300
RTE/train.tsv 2400
RTE/dev.tsv 270
"

# MD5 of files that LM-BFF's splits, whose checksums are published, contain unchanged.
published_md5="
CoLA/dev.tsv c5475ccefc9e7ca0917294b8bbda783c
MRPC/dev.tsv 185958e46ba556b38c6a7cc63f3a2135
QQP/dev.tsv cff6a448d1580132367c22fc449ec214
STS-B/dev.tsv 5f4d6b0d2a5f268b1b56db773ab2f1fe
MNLI/dev_matched.tsv c3fa2817007f4cdf1a03663611a8ad23
MNLI/dev_mismatched.tsv b219e6fe74e4aa779e2f417ffe713053
SNLI/dev.tsv 39d5338b0c2299bde98a3cdd0c4d04a5
QNLI/dev.tsv 1e81e211959605f144ba6c0ad7dc948b
RTE/dev.tsv 973cb4178d4534cf745a01c309d4a66c
"

fail() {
    echo "error: $*" >&2
    exit 1
}

clean_up() {
    if [ -n "$staging" ]; then
        rm -rf "$staging"
    fi
}
trap clean_up EXIT

# Say what is wrong with the files of one task below a folder; say nothing if they are as expected.
problem_of() {
    local root=$1 task=$2 file least most rows
    while read -r file least most; do
        if [ "${file%%/*}" != "$task" ]; then
            continue
        elif [ ! -f "$root/$file" ]; then
            echo "$file is missing"
            return
        fi
        rows=$(grep -c '' "$root/$file" || true)
        if [ "$rows" -lt "$least" ]; then
            echo "$file has $rows rows, fewer than $least"
            return
        elif [ -n "$most" ] && [ "$rows" -gt "$most" ]; then
            echo "$file has $rows rows, more than $most"
            return
        fi
    done <<<"$expected_rows"
}

# Print the tasks whose folders are not there; those that are there must be complete.
missing_tasks() {
    local task problem
    for task in $tasks; do
        if [ ! -d "$originals/$task" ]; then
            echo "$task"
            continue
        fi
        problem=$(problem_of "$originals" "$task")
        if [ -n "$problem" ]; then
            fail "in $originals, $problem: move the folder $task away and run this again"
        fi
    done
}

# Print the full path of an interpreter whose tarfile module can refuse unsafe members.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" "$here/../.venv/bin/python" python3 python; do
        if [ -n "$candidate" ] &&
            "$candidate" -c 'import sys, tarfile; tarfile.data_filter; print(sys.executable)' 2>/dev/null; then
            return
        fi
    done
    fail "no Python of version 3.11.4 or later is there to unpack the archive: name one with PYTHON=..."
}

# Get the archive into a file, going on behind what that file holds already.
download_to() {
    if command -v curl >/dev/null; then
        curl --fail --location "$([ -t 2 ] && echo --progress-bar || echo --silent)" --continue-at - --output "$1" "$url"
    elif command -v wget >/dev/null; then
        wget "$([ -t 2 ] && echo --progress=bar || echo --quiet)" --tries=3 --continue --output-document="$1" "$url"
    else
        fail "neither curl nor wget is there to fetch $url: install one of them"
    fi
}

fetch_archive() {
    local part=$archive.part
    echo "fetching $url"
    if ! download_to "$part"; then
        # Some servers cannot go on in the middle, and none can behind the end: start afresh, but keep what there is
        # until that has worked.
        if [ ! -s "$part" ] || ! { rm -f "$part.afresh" && download_to "$part.afresh"; }; then
            rm -f "$part.afresh"
            [ -s "$part" ] || rm -f "$part"
            fail "cannot fetch $url, is there a network? With the archive from elsewhere as $archive, run this again"
        fi
        mv -f "$part.afresh" "$part"
    fi
    mv -f "$part" "$archive"
}

# Links and names that lead outside the folder are refused by Python's "data" filter.
unpack() {
    "$python" - "$archive" "$staging" <<'END' || exit 1
import sys
import tarfile

archive, folder = sys.argv[1:]
try:
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="data")
except tarfile.FilterError as error:
    sys.exit(f"error: {archive} is not the archive of the data sets: {error}")
except (tarfile.TarError, EOFError) as error:
    sys.exit(f"error: {archive} is damaged ({error}): delete it and run this again")
except OSError as error:
    sys.exit(f"error: cannot unpack {archive}: {error}")
END
}

checksum() {
    "$python" -c 'import hashlib, sys; print(hashlib.file_digest(open(sys.argv[2], "rb"), sys.argv[1]).hexdigest())' "$@"
}

check_sha256() {
    local found
    found=$(checksum sha256 "$archive")
    if [ "$found" != "$DATASETS_SHA256" ]; then
        fail "$archive has the SHA-256 $found, not $DATASETS_SHA256 as DATASETS_SHA256 says: delete it and run this again"
    fi
}

# The archive brings GLUE's SST-2 beside the sentence-level set.
take_glue_sst2() {
    if [ ! -d "$1/GLUE-SST-2" ]; then
        fail "$archive has no folder original/GLUE-SST-2, the SST-2 of GLUE"
    fi
    mv "$1/SST-2" "$1/SST-2-original"
    mv "$1/GLUE-SST-2" "$1/SST-2"
}

# The archive's own script splits `cr`, with 1000 test examples of each class; the published kernels have 250, which
# leaves enough for training on 512. It works on the unpacked copy, so it always starts from the archive's files.
split_cr_anew() {
    if ! grep -q 1000 "$1/process.py" 2>/dev/null; then
        fail "$archive has no original/cr/process.py that takes 1000 test examples of a class: cannot split cr anew"
    fi
    sed 's/1000/250/' "$1/process.py" >"$1/process.py.edited"
    mv -f "$1/process.py.edited" "$1/process.py"
    if ! (cd "$1" && "$python" process.py >process.log 2>&1); then
        fail "splitting cr anew failed: $(tail -n 1 "$1/process.log")"
    fi
    rm -f "$1/process.log"
}

missing=$(missing_tasks)
if [ -z "$missing" ]; then
    echo "all data sets are in $originals"
    exit 0
fi

python=$(find_python)
if [ ! -f "$archive" ]; then
    fetch_archive
fi
if [ -n "${DATASETS_SHA256:-}" ]; then
    check_sha256
fi

staging=$(mktemp -d "$here/.unpacking.XXXXXX")
echo "unpacking $archive"
unpack
for task in SST-2 cr; do
    if [ ! -d "$staging/original/$task" ]; then
        fail "$archive is not the archive of the data sets: it has no folder original/$task"
    fi
done
take_glue_sst2 "$staging/original"
split_cr_anew "$staging/original/cr"
for task in $missing; do
    problem=$(problem_of "$staging/original" "$task")
    if [ -n "$problem" ]; then
        fail "$archive is not complete: $problem"
    fi
done

while read -r file md5; do
    if [ -n "$file" ] && [ ! -d "$originals/${file%%/*}" ] && [ "$(checksum md5 "$staging/original/$file")" != "$md5" ]; then
        echo "warning: $file is not the file that LM-BFF's published splits were drawn with (MD5 $md5)" >&2
    fi
done <<<"$published_md5"

mkdir -p "$originals"
for folder in "$staging"/original/*/; do
    name=$(basename "$folder")
    if [ ! -e "$originals/$name" ]; then
        mv "$folder" "$originals/$name"
    fi
done
echo "${missing//$'\n'/, }: now in $originals; $archive is no longer needed"
