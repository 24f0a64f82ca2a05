#!/bin/sh
# Makes data in the background and trains: run.sh WORK_DIR SEED SECONDS WALL [train.py options]
work=$1 seed=$2 seconds=$3 wall=$4
shift 4
cd "$(dirname "$0")"
mkdir -p "$work/data"
rm -f "$work/data/stop"
python3 data/make.py workers "$work/data" ../models/ds4-nano/tokenizer.json "$seed" 6 0.3 260 &
timeout $((wall + 25)) python3 train.py --data "$work/data" --out "$work/run" --seconds "$seconds" --wall "$wall" --seed "$seed" "$@"
touch "$work/data/stop"
