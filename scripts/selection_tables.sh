#!/usr/bin/env bash
# The simulations behind docs/selection.md, about a quarter of an hour on two cores:
#   bash scripts/selection_tables.sh FOLDER
# Each writes table.md, curves.jsonl and curves.png into FOLDER/NAME.
set -euo pipefail
folder=${1:?name a folder}
export OMP_NUM_THREADS=1 # simulations run side by side

main=uniform,bots,bots_dots,bots_mopps,adarft,dapo,bots_dapo,oracle
others=uniform,epoch,easy_to_hard,mopps,vade,greso,mixture,pcl,dots
others+=,speed,knapsack,coba,dars,e3,reinforce_ada,xrpo
others+=",'bots scheduler/planner=coba','bots scheduler/selector=cooldown'"
others+=",'bots scheduler/selector=coverage'"

simulate() {
    name=$1
    shift
    python -m rft.simulate "folder=$folder" "name=$name" "$@" >"$folder/$name.log"
    echo "$name: $folder/$name/table.md"
}

mkdir -p "$folder"
simulate main "arms=[$main]" seeds=10
simulate others "arms=[$others]" seeds=5
for world in mislabelled bad_references easy; do
    simulate "$world" "arms=[$main]" "world=$world" seeds=5
done
simulate large_pool "arms=[$main]" world.tasks=30000 seeds=5
simulate late "arms=[$main]" delay=8 seeds=5
simulate adaptive_weight "arms=[uniform,bots,'bots scheduler.estimator.adaptive=true']" \
    world=bad_references seeds=5
