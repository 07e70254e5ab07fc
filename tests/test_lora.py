"""LoRA on a small Qwen2, and the rank budgets' arithmetic. About 12 s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rft.config.parts import build, check
from rft.errors import RftError
from rft.learner.lora import Lora
from rft.learner.rank_budgets import AdaLora, Components, DynamicRank, component_scores, smoothed
from rft.state import load_state, save_state

ADALORA = {"_target_": "rft.learner.rank_budgets.AdaLora"}
DYNAMIC = {"_target_": "rft.learner.rank_budgets.DynamicRank"}
FORMS = pytest.mark.parametrize("budget", [None, ADALORA, DYNAMIC], ids=["lora", "adalora", "dyn"])
TOKENS_BT = torch.tensor([[1, 7, 9, 30, 4, 8, 15], [1, 5, 5, 40, 22, 3, 11]])
CONFIGS = Path(__file__).parent.parent / "rft" / "configs" / "lora"


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapted(folder: Path, budget: dict[str, Any] | None, **keys: Any) -> tuple[Lora, Any]:
    """A model with adapters that do something; the budget forms have two components pruned."""
    lora, model = Lora(**{"rank": 4, "alpha": 8, "budget": budget} | keys), load(folder)
    lora.wrap(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if "lora_E" in name:
                parameter[:2] = 0.0
    return lora, model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS_BT).logits


def loss(model: Any) -> torch.Tensor:
    return model(TOKENS_BT, labels=TOKENS_BT).loss


def copy_into(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def value(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.detach()


def train(
    lora: Lora, model: Any, optimizer: torch.optim.Optimizer, first: int, last: int, steps: int
) -> list[float]:
    """The mean rank after each optimizer step from `first` to before `last`."""
    ranks = []
    for step in range(first, last):
        optimizer.zero_grad()
        total, penalty = loss(model), lora.penalty(model, step, steps)
        (total if penalty is None else total + penalty).backward()
        lora.observe(model, step, steps, grad, value)
        optimizer.step()
        ranks.append(lora.after_step(model, step, steps, value, copy_into)["lora_rank"])
    return ranks


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def active(model: Any) -> int:
    return sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)


# The model


@FORMS
def test_fresh_adapters_leave_the_policy_as_it_was(tiny_model: Path, budget: Any) -> None:
    base, model = load(tiny_model), load(tiny_model)
    Lora(budget=budget).wrap(model, seed=0)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=0)


@FORMS
def test_the_base_is_frozen_and_the_adapters_learn_in_float32(
    tiny_model: Path, budget: Any
) -> None:
    model = load(tiny_model, torch.bfloat16)
    Lora(rank=2, budget=budget).wrap(model, seed=0)
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    factors = 2 if budget is None else 3
    assert len(learning) == factors * 2 * 7  # 2 layers of 7 linear maps
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in learning.items())
    frozen = [p for p in model.parameters() if not p.requires_grad and p.numel() > 1]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@FORMS
def test_adapters_depend_on_the_seed_alone(tiny_model: Path, budget: Any) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 1)  # the global stream is elsewhere each time
        model = load(tiny_model)
        before = torch.get_rng_state()
        Lora(budget=budget).wrap(model, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return {n: p.detach() for n, p in model.named_parameters() if "lora_A" in n}

    first, again, other = start(5), start(5), start(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@FORMS
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_compute_what_the_adapters_do(
    tiny_model: Path, budget: Any, rslora: bool
) -> None:
    lora, model = adapted(tiny_model, budget, rslora=rslora)
    base = load(tiny_model)
    names = [name for name, _ in base.named_parameters()]
    assert not torch.allclose(logits(model), logits(base), atol=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = dict(lora.merged(model.named_parameters()))
    assert sorted(weights) == sorted(names)  # tied: there is no lm_head.weight
    base.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_merging_takes_any_order_and_tensors_that_are_freed_at_once(tiny_model: Path) -> None:
    lora, model = adapted(tiny_model, ADALORA)
    expected = dict(lora.merged(model.named_parameters()))

    def shrinking() -> Any:
        for name, parameter in reversed(list(model.named_parameters())):
            tensor = parameter.detach().clone()
            yield name, tensor
            tensor.fill_(float("nan"))  # as ZeRO-3 does when the next bucket is gathered

    found = {name: tensor.clone() for name, tensor in lora.merged(shrinking())}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_merging_rounds_a_bfloat16_weight_once(tiny_model: Path) -> None:
    model = load(tiny_model, torch.bfloat16)
    lora = Lora(rank=2, alpha=6, targets=["q_proj"])
    lora.wrap(model, seed=0)
    module = model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(module.lora_B.default.weight, std=0.03)
    weights = dict(lora.merged(model.named_parameters()))
    a_RI, b_OR = module.lora_A.default.weight.double(), module.lora_B.default.weight.double()
    exact_OI = module.base_layer.weight.double() + 3.0 * b_OR @ a_RI
    merged_OI = weights["model.layers.0.self_attn.q_proj.weight"]
    assert merged_OI.dtype == torch.bfloat16
    # Half a unit in the last place of 8 bits, and float32's own error.
    assert ((merged_OI.double() - exact_OI).abs() <= exact_OI.abs() * 2.0**-8 + 1e-7).all()
    assert weights["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16


@FORMS
@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_adapter_loads_with_peft(
    tiny_model: Path, tmp_path: Path, budget: Any, rslora: bool
) -> None:
    lora, model = adapted(tiny_model, budget, rslora=rslora)
    lora.save(model, model.named_parameters(), tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == (4 if budget is None else 6)
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert config["target_modules"] == sorted(config["target_modules"])
    loaded = PeftModel.from_pretrained(load(tiny_model), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@FORMS
def test_the_disabled_policy_is_the_base_and_comes_back(tiny_model: Path, budget: Any) -> None:
    lora, model = adapted(tiny_model, budget)
    with_adapters, learning = logits(model), [p.requires_grad for p in model.parameters()]
    with lora.disabled(model):
        torch.testing.assert_close(logits(model), logits(load(tiny_model)), rtol=0, atol=0)
        assert [p.requires_grad for p in model.parameters()] == learning
    torch.testing.assert_close(logits(model), with_adapters, rtol=0, atol=0)
    with pytest.raises(ValueError, match="from within"), lora.disabled(model):
        raise ValueError("from within")
    torch.testing.assert_close(logits(model), with_adapters, rtol=0, atol=0)


def test_training_moves_the_adapters_alone_and_lowers_the_loss(tiny_model: Path) -> None:
    lora, model = Lora(rank=4, alpha=8), load(tiny_model)
    lora.wrap(model, seed=0)
    start = loss(model).item()
    optimizer = torch.optim.Adam(trained(model), lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < 0.5 * start
    with lora.disabled(model):
        assert loss(model).item() == pytest.approx(start, abs=1e-6)
    assert lora.after_step(model, 0, 15, value, copy_into) == {}
    assert lora.penalty(model, 0, 15) is None
    assert lora.state() == {}


def test_named_targets_are_adapted_and_no_others(tiny_model: Path) -> None:
    model = load(tiny_model)
    Lora(targets=["q_proj", "mlp.up_proj"]).wrap(model, seed=0)
    names = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {
        f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")
    }


# What is refused


@pytest.mark.parametrize(
    ("target", "hint"),
    [("q_prj", "'q_proj'"), ("lm_head", "output head"), ("embed_tokens", "no linear layer")],
)
def test_an_unknown_target_is_named_with_the_nearest(
    tiny_model: Path, target: str, hint: str
) -> None:
    with pytest.raises(RftError, match=f"{target}.*{hint}"):
        Lora(targets=["q_proj", target]).wrap(load(tiny_model), seed=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"targets": "q_proj"}, "targets='q_proj'"),
        ({"targets": []}, "targets="),
        ({"budget": ADALORA | {"warmup": 0.6, "final": 0.4}}, "warmup=0.6"),
        ({"budget": ADALORA | {"initial": 0.5}}, "initial=0.5"),
        ({"budget": ADALORA | {"beta1": 1.0}}, "beta1=1"),
        ({"budget": DYNAMIC | {"start": 0.5, "end": 0.5}}, "start=0.5"),
        ({"budget": DYNAMIC | {"beta": 1.0}}, "beta=1"),
        ({"budget": DYNAMIC | {"every": 0}}, "every=0"),
    ],
)
def test_a_key_out_of_range_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RftError, match=message):
        Lora(**keys)


def test_a_budget_is_refused_where_adapters_are_split_over_ranks(tiny_model: Path) -> None:
    model = load(tiny_model)
    with pytest.raises(RftError, match="zero_stage=3"):
        Lora(budget=DYNAMIC).wrap(model, seed=0, zero_stage=3)
    Lora().wrap(model, seed=0, zero_stage=3)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_lora_config_names_a_part_that_builds(path: Path) -> None:
    part = OmegaConf.to_container(OmegaConf.load(path))
    if path.stem == "none":
        assert part == {"lora": None}
        return
    check("learner.lora", part)
    assert isinstance(build(part), Lora)


# Rank budgets: arithmetic


def test_adaloras_components_fall_along_a_cubic() -> None:
    budget = AdaLora(8, warmup=0.1, final=0.2)
    steps = (0, 100, 300, 500, 799, 800, 999)
    found = [budget.components(t, 1000, 144, 96) for t in steps]
    assert found == [144, 144, 113, 99, 96, 96, 96]


def test_adaloras_importance_is_smoothed_sensitivity_times_uncertainty() -> None:
    x = [torch.tensor([v], dtype=torch.float64) for v in (0.3, 0.1, 0.5)]
    importance, uncertainty = smoothed(*x, 0.85, 0.85)
    assert importance.item() == pytest.approx(0.33, abs=1e-12)
    assert uncertainty.item() == pytest.approx(0.1105, abs=1e-12)
    assert (importance * uncertainty).item() == pytest.approx(0.036465, abs=1e-12)


def test_a_dynamic_ranks_pruned_fraction_rises_with_the_cube() -> None:
    budget = DynamicRank(8)
    assert budget.initial_rank == 12
    found = [budget.pruned(t, 1000) for t in (100, 150, 325, 500, 900)]
    assert found == pytest.approx([0, 0, 1 / 24, 1 / 3, 1 / 3], abs=1e-12)


def test_the_rank_at_first_is_rounded_up_but_not_by_rounding_errors() -> None:
    assert DynamicRank(3).initial_rank == 5
    assert DynamicRank(10, initial=1.1).initial_rank == 11  # 1.1 * 10 is above 11 in float64


def random_layer(rank: int = 3) -> Components:
    shapes = ((rank, 7), (rank, 1), (5, rank))
    return Components(*(torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes))


def test_component_scores_are_shares_of_the_updates_norm() -> None:
    layer = random_layer()
    a_RI, e_R1, b_OR = (p.detach() for _, p in layer.parts())
    whole = (b_OR * e_R1[:, 0]) @ a_RI
    each = [torch.outer(b_OR[:, i], a_RI[i]) * e_R1[i] for i in range(3)]
    expected = torch.stack([x.norm() for x in each]) / (whole.norm() + 1e-8)
    torch.testing.assert_close(component_scores(a_RI, e_R1, b_OR), expected, rtol=1e-10, atol=0)
    assert not component_scores(a_RI, 0 * e_R1, b_OR).any()


def test_a_dynamic_ranks_scores_are_smoothed() -> None:
    budget = DynamicRank(1, initial=1.0)
    budget.load({"scores": {"w": torch.tensor([0.2]).numpy()}})
    # A weight's only component is all of its update: its score is 1.
    one = torch.nn.Parameter(torch.ones(1, 1))
    budget.after_step({"w": Components(one, one, one)}, 1, 100, value, copy_into)
    assert budget.state()["scores"]["w"] == pytest.approx([0.9 * 0.2 + 0.1 * 1.0], abs=1e-6)


@pytest.mark.parametrize("budget", [AdaLora(2), DynamicRank(2)], ids=["adalora", "dyn"])
def test_the_penaltys_gradient_is_its_slope(budget: Any) -> None:
    layers = {"v": random_layer(), "w": random_layer()}
    parameters = [p for layer in layers.values() for _, p in layer.parts()]
    # The product computes in float32; its slope is measured in float64.
    for layer in layers.values():
        for _, parameter in layer.parts():
            parameter.float = lambda parameter=parameter: parameter  # type: ignore[method-assign]

    def penalty(*_: torch.Tensor) -> torch.Tensor:
        found = budget.penalty(layers, 0, 100)
        assert found is not None
        return found

    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for i in range(parameter.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * 1e-6
                    sides.append(penalty().item())
                    parameter.view(-1)[i] -= sign * 1e-6
            slope = (sides[0] - sides[1]) / 2e-6
            own = 0.0 if gradient is None else gradient.view(-1)[i].item()
            assert own == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_orthogonal_factors_cost_nothing_and_doubled_ones_do() -> None:
    eye = torch.eye(3, 7)
    layer = Components(*(torch.nn.Parameter(x) for x in (eye, torch.ones(3, 1), torch.eye(5, 3))))
    assert AdaLora(2).penalty({"w": layer}, 0, 10).item() == 0.0  # type: ignore[union-attr]
    with torch.no_grad():
        layer.a_RI.mul_(2.0)  # ||4I - I||^2 = 27
    found = AdaLora(2).penalty({"w": layer}, 0, 10)
    assert found is not None
    assert found.item() == pytest.approx(2.7)


def test_the_variance_penalty_ends_with_the_pruning_and_spares_even_vectors() -> None:
    layer, budget = random_layer(), DynamicRank(2, end=0.5)
    assert budget.penalty({"w": layer}, 50, 100) is not None
    assert budget.penalty({"w": layer}, 51, 100) is None
    with torch.no_grad():
        layer.a_RI.copy_(torch.ones(3, 7) * torch.tensor([[1.0], [2.0], [3.0]]))
        layer.b_OR.fill_(1.0)
        assert budget.penalty({"w": layer}, 0, 100).item() == 0.0  # type: ignore[union-attr]
        layer.b_OR[:, 0] = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0])  # variance 5
    found = budget.penalty({"w": layer}, 0, 100)
    assert found is not None
    assert found.item() == pytest.approx(0.1 * (5.0 / 3) / 2)


# Rank budgets: over a run


@pytest.mark.parametrize("every", [5, 20])
def test_adalora_keeps_the_scheduled_number_of_components(tiny_model: Path, every: int) -> None:
    lora, model = Lora(rank=2, budget=ADALORA | {"every": every}), load(tiny_model)
    lora.wrap(model, seed=0)
    ranks = train(lora, model, torch.optim.Adam(trained(model), lr=1e-2), 0, 40, 40)
    budget = AdaLora(2)  # from step 4, enforced at multiples of `every`, to step 32
    due = [every * (t // every) if t < 32 else 32 for t in range(40)]
    assert ranks == [budget.components(t, 40, 14 * 3, 14 * 2) / 14 for t in due]
    assert ranks[0] == 3
    assert ranks[-1] == 2
    assert active(model) == 28


def test_adalora_prunes_what_the_loss_does_not_feel() -> None:
    """dL/dw is put in by hand: only component 2 of one weight and 0 of the other matter."""
    layers = {"v": random_layer(), "w": random_layer()}
    for layer in layers.values():
        for _, parameter in layer.parts():
            parameter.grad = torch.full_like(parameter, 1e-3)
    for name, i in (("v", 2), ("w", 0)):
        with torch.no_grad():
            layers[name].e_R1.grad[i] = 10.0  # type: ignore[index]
            layers[name].e_R1[i] = 0.5
    budget = AdaLora(1, initial=3, every=1)
    for step in range(9):
        budget.observe(layers, step, 10, grad, value)
        budget.after_step(layers, step, 10, value, copy_into)
    assert [layers[name].e_R1.nonzero()[:, 0].tolist() for name in "vw"] == [[2], [0]]


@pytest.mark.parametrize("letter", "aeb")
def test_adaloras_score_counts_all_three_factors(letter: str) -> None:
    layer = random_layer()
    for own, parameter in layer.parts():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
        if own == letter:
            parameter.grad.select(1 if own == "b" else 0, 1).fill_(1.0)  # of component 1 alone
    budget = AdaLora(1, initial=3, every=1, warmup=0.0, final=1.0 - 1e-9)
    budget.observe({"w": layer}, 0, 10, grad, value)
    assert budget.after_step({"w": layer}, 0, 10, value, copy_into) == 1
    assert layer.e_R1[:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("resume", [False, True])
def test_adaloras_last_choice_stands(resume: bool) -> None:
    layer, budget = random_layer(), AdaLora(1, initial=3, every=1)
    for step in range(10):  # settled at step 8
        for _, parameter in layer.parts():
            parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            layer.e_R1.fill_(1.0)
            grad(layer.e_R1)[2 if step <= 8 else 0] = 1.0 if step <= 8 else 1e6
        if resume and step == 9:
            state, budget = budget.state(), AdaLora(1, initial=3, every=1)
            budget.load(state)
        budget.observe({"w": layer}, step, 10, grad, value)
        budget.after_step({"w": layer}, step, 10, value, copy_into)
    assert layer.e_R1[:, 0].tolist() == [0, 0, 1]


def test_a_pruned_component_stays_so_though_others_score_less_by_now() -> None:
    layer, budget = random_layer(), DynamicRank(1, initial=3)
    scores, kept = torch.tensor([0.9, 0.2, 0.1]), torch.tensor([False, True, True])
    budget.load({"scores": {"w": scores.numpy()}, "kept": {"w": kept.numpy()}})
    with torch.no_grad():
        layer.e_R1.mul_(1e-3)
    assert budget.after_step({"w": layer}, 60, 100, value, copy_into) == 1
    assert (layer.e_R1[:, 0] != 0).tolist() in ([False, True, False], [False, False, True])


def test_a_dynamic_rank_only_falls_and_what_is_pruned_stays_so(tiny_model: Path) -> None:
    lora, model = Lora(rank=2, budget=DYNAMIC | {"every": 3}), load(tiny_model)
    lora.wrap(model, seed=0)
    optimizer = torch.optim.Adam(trained(model), lr=1e-2)
    budget, ranks, gone = DynamicRank(2), [], None
    for step in range(40):
        ranks += train(lora, model, optimizer, step, step + 1, 40)
        zero = torch.cat([p == 0 for n, p in model.named_parameters() if "lora_E" in n])
        assert gone is None or not (gone & ~zero).any()
        gone = zero
        assert active(model) == round(14 * ranks[-1])
    due = [
        t if t == 20 else 18 if 18 < t < 20 else 20 if t > 20 else 3 * (t // 3) for t in range(40)
    ]
    assert ranks == [(42 - int(42 * budget.pruned(t, 40) + 1e-9)) / 14 for t in due]
    assert (ranks[0], ranks[-1]) == (3, 2)


def test_a_dynamic_rank_prunes_the_smallest_components_over_all_weights() -> None:
    layers = {"v": random_layer(), "w": random_layer()}
    with torch.no_grad():
        for layer, sizes in zip(layers.values(), ([9.0, 5.0, 4.0], [9.0, 1.0, 1.0]), strict=True):
            layer.a_RI.copy_(torch.eye(3, 7))
            layer.b_OR.copy_(torch.eye(5, 3))
            layer.e_R1.copy_(torch.tensor(sizes)[:, None])
    budget = DynamicRank(2)
    assert budget.after_step(layers, 60, 100, value, copy_into) == 2
    assert layers["v"].e_R1[:, 0].tolist() == [9, 5, 4]
    assert layers["w"].e_R1[:, 0].tolist() == [9, 0, 0]


def test_a_pruned_master_is_set_together_with_the_computing_weight() -> None:
    layers = {"v": random_layer(), "w": random_layer()}
    masters = {p: p.detach().float() + 1.0 for x in layers.values() for _, p in x.parts()}
    DynamicRank(2).after_step(layers, 60, 100, masters.__getitem__, masters.__setitem__)
    for layer in layers.values():
        if (pruned := masters[layer.e_R1] == 0).any():
            assert torch.equal(layer.e_R1.float(), masters[layer.e_R1])
            assert pruned.any()
    assert sum(int((layer.e_R1 == 0).sum()) for layer in layers.values()) == 2


@pytest.mark.parametrize("budget", [ADALORA, DYNAMIC], ids=["adalora", "dyn"])
@pytest.mark.parametrize("stop", [3, 14, 27])
def test_a_resumed_budget_goes_on_to_the_last_bit(
    tiny_model: Path, tmp_path: Path, budget: dict[str, Any], stop: int
) -> None:
    keys = {"rank": 2, "budget": budget | {"every": 4}}

    def run(resume: bool) -> tuple[list[torch.Tensor], list[float]]:
        lora, model = Lora(**keys), load(tiny_model)
        lora.wrap(model, seed=0)
        optimizer = torch.optim.Adam(trained(model), lr=1e-2)
        train(lora, model, optimizer, 0, stop, 30)
        if resume:
            save_state(tmp_path / "lora.safetensors", lora.state())
            weights, moments = model.state_dict(), optimizer.state_dict()
            lora, model = Lora(**keys), load(tiny_model)
            lora.wrap(model, seed=1)
            model.load_state_dict(weights)
            optimizer = torch.optim.Adam(trained(model), lr=1e-2)
            optimizer.load_state_dict(moments)
            lora.load(load_state(tmp_path / "lora.safetensors"))
        ranks = train(lora, model, optimizer, stop, 30, 30)
        return [p.detach() for p in trained(model)], ranks

    (straight, ranks), (resumed, again) = run(False), run(True)
    assert ranks == again
    assert all(torch.equal(x, y) for x, y in zip(straight, resumed, strict=True))
