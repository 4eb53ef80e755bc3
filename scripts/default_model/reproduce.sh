#!/usr/bin/env bash
# The default model from nothing: about 35 minutes on two free cores. See README.md here for what it needs.
#
#   scripts/default_model/reproduce.sh [EXCERPTS.txt…]      excerpts of TinyStories; without them only our own grammar
#
# Environment: WORK (default ./work) takes all files, THREADS (2), STEPS (2500), PYTHON (python).
set -euo pipefail
sources=()
for file in "$@"; do sources+=("$(realpath "$file")"); done
mkdir -p "${WORK:-work}/data"
work=$(realpath "${WORK:-work}")
python=${PYTHON:-python}
cd "$(dirname "$0")"
tokenizer=tokenizer.json  # made by: build_tokenizer.py train OUT.json ts.txt, and the first 2.6 MB of tales.txt
data=$work/data
pack() { "$python" build_tokenizer.py pack "$tokenizer" "$1" "$data" "$work/$1.txt" "${2:-0}"; }

"$python" gen_corpus.py "$work/tales.txt" 64000 11  # 53 MB, 13.8 million tokens
"$python" gen_corpus.py "$work/unseen.txt" 300 199
"$python" gen_repeat.py "$work/tales.txt" "$work/repeat.txt" 40000 5
pack tales
pack unseen 299
pack repeat 300
excerpts() { :; }
if [ ${#sources[@]} -gt 0 ]; then
    "$python" clean_tinystories.py "$work/tinystories.txt" "${sources[@]}"
    "$python" augment_names.py "$work/tinystories.txt" "$work/varied.txt" 12 3 80  # without those held out
    pack tinystories 80
    pack varied
    excerpts() { echo ",train_varied.bin:$1"; }
fi

train() { "$python" train.py --data "$data" --out "$work/run" --threads "${THREADS:-2}" "$@"; }
# First words and phrases, then copying (the induction heads form here), then all of it.
train --steps 488 --warmup 15 --lengths 256:0.85,512:0.15 \
    --mix "train_tales.bin:0.5$(excerpts 0.3),train_repeat.bin:0.2"
train --steps 836 --lengths 128:0.7,256:0.3 --mix train_tales.bin:0.33,train_repeat.bin:0.67
train --steps "${STEPS:-2500}" --decay-steps 900 --lengths 256:0.75,512:0.2,1024:0.05 \
    --mix "train_tales.bin:0.55$(excerpts 0.33),train_repeat.bin:0.12"

for type in f16 q8_0; do
    "$python" export_gguf.py "$work/run/last.pt" "$tokenizer" "$work/tiny-mla-tales-${type^^}.gguf" "$type"
done
"$python" verify_gguf.py "$work/run/last.pt" "$tokenizer" "$work"/tiny-mla-tales-{F16,Q8_0}.gguf
"$python" evaluate.py "$work/tiny-mla-tales-Q8_0.gguf"
