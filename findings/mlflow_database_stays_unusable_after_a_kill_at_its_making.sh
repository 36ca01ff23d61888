#!/usr/bin/env bash
# mlflow-skinny 3.17.2: a SQLite store stays unusable if the process that makes it is killed meanwhile (for want of memory, say).
#
# Expected: the store is made by one transaction, or the next start ends what was begun, as after a kill at any later time.
# Seen: its tables are made and altered by some seventy migrations, and SQLite keeps each statement at once. After a kill
# between two statements the next start repeats the migration that was cut, which fails on what it made before; so does every
# later start, until the file is removed by hand.
#
# Output seen:
#   killed after CREATE TABLE 12: OperationalError: (sqlite3.OperationalError) table registered_models already exists
#   killed after CREATE TABLE 20: OperationalError: (sqlite3.OperationalError) table _alembic_tmp_params already exists
#   killed after CREATE TABLE 40: OperationalError: (sqlite3.OperationalError) table entity_associations already exists
#   not killed: ok
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1
cat > "$folder/first.py" <<'PYTHON'
import os
import signal
import sys

import sqlalchemy
from mlflow import MlflowClient

made = 0


@sqlalchemy.event.listens_for(sqlalchemy.Engine, "after_cursor_execute")
def count(connection, cursor, statement, *_):
    global made
    made += statement.lstrip().startswith("CREATE TABLE")
    if 0 < made == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)


MlflowClient(sys.argv[1])
PYTHON
cat > "$folder/later.py" <<'PYTHON'
import sys

from mlflow import MlflowClient

try:
    MlflowClient(sys.argv[1]).search_experiments()
    print("ok")
except Exception as error:
    print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
PYTHON
for moment in 12 20 40 0; do
    store=sqlite:///$folder/$moment.db
    code=0
    { "$folder/venv/bin/python" "$folder/first.py" "$store" "$moment" || code=$?; } 2> "$folder/said"
    case $moment in 0) what="not killed" wanted=0 ;; *) what="killed after CREATE TABLE $moment" wanted=137 ;; esac
    if [[ $code != "$wanted" ]]; then cat "$folder/said" >&2 && exit 1; fi
    "$folder/venv/bin/python" "$folder/later.py" "$store" 2> /dev/null > "$folder/second"
    "$folder/venv/bin/python" "$folder/later.py" "$store" 2> /dev/null > "$folder/third"
    cmp "$folder/second" "$folder/third"
    echo "$what: $(cat "$folder/third")"
done | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   //p' "$0")
