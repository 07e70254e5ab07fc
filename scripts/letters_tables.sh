#!/usr/bin/env bash
# The CPU-scale tables of docs/results, anew: runs that are there already are not made again.
#   scripts/letters_tables.sh [runs at a time]
set -euo pipefail
parallel=${1:-2}
out=docs/results

sweep() { # sweep EXPERIMENT TABLE
    python -m rft.train -m "+experiment=[$1,tables/$2]" "hydra.launcher.parallel=$parallel"
}

sweep letters_clean search
python -m rft.report runs/letters_clean/search --set validation --out $out/letters_clean/search
for pool in letters_clean letters_mislabelled; do
    runs=runs/$pool
    sweep $pool bots_main
    python -m rft.report "$runs/bots_main" --out "$out/$pool/bots_main"
    for table in bots_rho bots_lambda; do
        sweep $pool $table
        # Baseline and default are bots_main's.
        python -m rft.report "$runs/bots_main/"*scheduler={uniform,bots},* "$runs/$table" \
            --out "$out/$pool/$table"
    done
done
