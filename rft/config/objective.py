"""Which choices of advantage, ratio, clipping and the rest do not go together, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rft.config.placement import resolve_device
from rft.config.schema import Config, Part
from rft.errors import RftError

OURS = "rft.learner.objectives.PolicyLoss"
PER_SEQUENCE = ("SequenceTruncated", "SequenceMask")


def check_objective(config: Config) -> None:
    """Raise `RftError` naming a pair of choices that is no objective, with the reason. An objective
    of one's own is not looked into."""
    if config.objective["_target_"] != OURS:
        return
    for refused, pair, reason in _rules(config):
        if refused:
            raise RftError(f"{pair} do not go together: {reason}")


def doubts(config: Config) -> list[str]:
    """A line for each pair of choices that is computed as it says, and is seldom what is meant."""
    found = [*_overlap(config)]
    if config.objective["_target_"] == OURS:
        found += [*_warnings(config), *_behaviour(config)]
    return [f"{pair}: {reason}" for true, pair, reason in found if true]


def _rules(config: Config) -> Iterator[tuple[bool, str, str]]:
    loss, advantage = config.objective, name_of(config.advantage)
    clip, correction, whiten = (name_of(loss.get(k)) for k in ("clip", "correction", "whiten"))
    ratio, to = loss.get("ratio", "token"), loss.get("ratio_to", "old")
    weighters = [name_of(part) for part in (loss.get("weighters") or {}).values()]
    terms = list((loss.get("kl") or {}).values())
    product = ratio == "product"

    yield (
        product and loss.get("aggregation", "token_mean") != "sequence_mean",
        "objective.ratio=product and any aggregation but sequence_mean",
        "a sequence's one loss would count once for each of its tokens",
    )
    yield (
        product and whiten == "Whiten",
        "objective.ratio=product and objective.whiten=Whiten",
        "one ratio a sequence needs one advantage a sequence; KlReward gives that",
    )
    yield (
        product and bool(weighters),
        f"objective.ratio=product and objective.weighters ({', '.join(weighters)})",
        "a token's weight would scale the gradient of the whole sequence",
    )
    yield (
        product and correction in ("TokenTruncated", "IcePop"),
        f"objective.ratio=product and objective.correction={correction}",
        "a token's weight would scale the gradient of the whole sequence; take one of sequences",
    )
    yield (
        clip == "Mix" and (ratio != "token" or to != "behaviour"),
        f"objective.clip=Mix and objective.ratio={ratio}, ratio_to={to}",
        "its window is for each token's ratio to the policy that sampled it; set ratio=token and "
        "ratio_to=behaviour",
    )
    yield (
        to == "behaviour" and bool(correction),
        f"objective.ratio_to=behaviour and objective.correction={correction}",
        "the ratio already is to the policy that sampled; set correction@objective.correction=none",
    )
    yield (
        clip in ("Aepo", "Bapo", "Mix") and ratio != "token",
        f"objective.clip={clip} and objective.ratio={ratio}",
        "it is defined on the ratios of tokens",
    )
    yield (
        clip == "Cispo" and product,
        "objective.clip=Cispo and objective.ratio=product",
        "its weight would be the sequence's and its log-prob the token's",
    )
    yield (
        clip == "Reinforce" and (ratio != "token" or to != "old"),
        f"objective.clip=Reinforce and objective.ratio={ratio}, ratio_to={to}",
        "it has no ratio, so these would be passed over in silence",
    )
    yield (
        clip == "Reinforce" and config.learner.updates > 1,
        f"objective.clip=Reinforce and learner.updates={config.learner.updates}",
        "nothing corrects for the steps between; take a clip with a ratio",
    )
    yield (
        bool(whiten) and advantage in ("GroupAdvantage", "GivenAdvantage") and _scaled(config),
        f"objective.whiten={whiten} and advantage={advantage}, scaled",
        "advantages would be scaled twice; use advantage=reward, mean or rloo",
    )
    yield (
        advantage == "RewardAdvantage" and whiten != "Whiten",
        "advantage=reward and an objective without whitening",
        "rewards without a baseline push up whatever was sampled; use advantage=group",
    )
    pulled = whiten == "KlReward" or bool((loss.get("whiten") or {}).get("kl_coef"))
    yield (
        pulled and any(not term.get("every") for term in terms),
        f"objective.whiten={whiten} with a KL and objective.kl to the same reference",
        "the policy would be pulled back twice; keep one of them",
    )
    yield (
        any(term.get("form", "k3") == "k1" for term in terms if name_of(term) == "Kl"),
        "objective.kl and form=k1",
        "its gradient is 0 on average; use k2 or k3, or objective.whiten with a kl_coef",
    )
    convex = [term.get("to") for term in terms if name_of(term) == "ConvexKl"]
    yield (
        bool(convex) and sorted(map(str, convex)) != ["base", "previous"],
        f"objective.kl with ConvexKl to {', '.join(map(str, convex))}",
        "it is convex with one term to base and one to previous",
    )
    yield (
        config.learner.lora is not None
        and any(term.get("every") or term.get("to") == "previous" for term in terms),
        "learner.lora and a reference that is refreshed",
        "with adapters the reference is the base model itself; set every=0",
    )


def _warnings(config: Config) -> Iterator[tuple[bool, str, str]]:
    loss = config.objective
    clip, correction = name_of(loss.get("clip")), name_of(loss.get("correction"))
    ratio, aggregation = loss.get("ratio", "token"), loss.get("aggregation", "token_mean")
    sequence = ratio == "sequence"
    whiten = loss.get("whiten") or {}
    yield (
        "kl_scale" in config.controllers
        and not loss.get("kl")
        and not whiten.get("kl_coef", whiten.get("coef")),
        "controllers.kl_scale with an objective without KL",
        "it has nothing to scale",
    )
    yield (
        sequence and aggregation != "sequence_mean",
        f"objective.ratio=sequence with aggregation={aggregation}",
        "GSPO is the mean over sequences",
    )
    yield (
        sequence and bool(loss.get("weighters")),
        "objective.ratio=sequence with objective.weighters",
        "advantages that differ between tokens make it GSPO-token",
    )
    yield (
        sequence and correction in ("IcePop", "TokenTruncated"),
        f"objective.ratio=sequence with correction={correction}",
        "tokens are weighed under one ratio for the sequence",
    )
    yield (
        sequence and clip == "Cispo",
        "objective.ratio=sequence with clip=Cispo",
        "no paper has this",
    )
    yield (
        correction in PER_SEQUENCE and config.rollout.max_tokens > 2048,
        f"objective.correction={correction} with rollout.max_tokens={config.rollout.max_tokens}",
        "a product over so many tokens is far from 1 for the least mismatch; tis and "
        "geometric_mask are not",
    )


def _behaviour(config: Config) -> Iterator[tuple[bool, str, str]]:
    """What makes the policy that samples another than the one that is learnt, uncorrected."""
    rollout, loss = config.rollout, config.objective
    bare = not loss.get("correction") and loss.get("ratio_to", "old") != "behaviour"
    reason = "the loss takes it to be the learner's own; set correction@objective.correction=tis"
    yield (
        bare and rollout.staleness > 0,
        f"rollout.staleness={rollout.staleness} with objective.correction=none",
        f"older weights sample, and {reason}",
    )
    yield (
        bare and (rollout.skip_ratio > 0 or "skip_ratio" in config.controllers),
        f"rollout.skip_ratio={rollout.skip_ratio} or its controller with objective.correction=none",
        f"fewer layers sample, and {reason}",
    )
    yield (
        bare and rollout.top_p < 1.0,
        f"rollout.top_p={rollout.top_p} with objective.correction=none",
        f"the nucleus is sampled from, and {reason}",
    )


def _overlap(config: Config) -> Iterator[tuple[bool, str, str]]:
    staleness, cluster = config.rollout.staleness, config.cluster
    shared = cluster.placement == "colocated" and staleness > 0
    yield (
        shared and resolve_device(cluster, planning=config.dry_run) == "cuda",
        f"rollout.staleness={staleness} with cluster.placement=colocated",
        "engines sleep while the learner works, so nothing overlaps; what is gained is that slow "
        "rollouts hold up no step, with rollout.partial=true",
    )


def _scaled(config: Config) -> bool:
    return config.advantage.get("scale", "group") != "none"


def name_of(part: Part | Any) -> str:
    """A part's class, without its module; empty for no part."""
    return str(part["_target_"]).rpartition(".")[2] if part else ""
