"""The scoring head equals log_softmax of the full logits, without ever holding them. About 6 s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from rft.errors import RftError
from rft.learner import head as head_file
from rft.learner.head import ScoringHead, scoring_head

TEMPERATURES = (0.5, 1.0, 1.7)


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either all logits fit into one buffer, or a buffer has room for 64 rows or columns."""
    if request.param == "many chunks":
        monkeypatch.setattr(head_file, "BUFFER", 1)


def problem(
    n: int, v: int, h: int, dtype: torch.dtype = torch.float64, bias: bool = False, seed: int = 0
) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head, hidden states, targets, and what each log-prob weighs in the loss."""
    torch.manual_seed(seed)
    linear = nn.Linear(h, v, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.normal_()
    hidden = torch.randn(n, h, dtype=dtype, requires_grad=True)
    weigh = torch.randn(n, dtype=torch.promote_types(dtype, torch.float32))
    return linear, hidden, torch.randint(v, (n,)), weigh


def full(
    linear: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: log_softmax of all logits."""
    logits = linear(hidden)
    logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(
        -1
    )
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1).detach()


def results(score: Any, linear: nn.Linear, hidden: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    """Log-probs, entropies and all gradients of sum(weigh * logp)."""
    targets, weigh, temperature = rest
    logp, entropy = score(hidden, targets, temperature)
    inputs = [x for x in (hidden, *linear.parameters()) if x.requires_grad]
    return [logp, entropy, *torch.autograd.grad((weigh * logp).sum(), inputs)]


def assert_equal_to_full(
    linear: nn.Linear, hidden: torch.Tensor, *rest: Any, **tolerance: float
) -> None:
    ours = results(ScoringHead(linear), linear, hidden, *rest)
    theirs = results(lambda *x: full(linear, *x), linear, hidden, *rest)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 200),
    v=st.integers(1, 200),
    h=st.integers(1, 9),
    temperature=st.sampled_from(TEMPERATURES),
    bias=st.booleans(),
    buffer=st.sampled_from([1, 4 * 64 * 100, 96 * 2**20]),
    seed=st.integers(0, 100),
)
def test_values_and_gradients_are_those_of_the_full_logits(
    n: int, v: int, h: int, temperature: float, bias: bool, buffer: int, seed: int
) -> None:
    linear, hidden, targets, weigh = problem(n, v, h, bias=bias, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_file, "BUFFER", buffer)
        assert_equal_to_full(linear, hidden, targets, weigh, temperature, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_float32_is_as_exact_as_log_softmax(temperature: float) -> None:
    linear, hidden, targets, weigh = problem(150, 5000, 16, torch.float32, bias=True)
    ours = results(ScoringHead(linear), linear, hidden, targets, weigh, temperature)
    assert {x.dtype for x in ours} == {torch.float32}
    theirs = results(lambda *x: full(linear, *x), linear, hidden, targets, weigh, temperature)
    double = linear.double()
    exact = results(
        lambda *x: full(double, *x), double, hidden.double(), targets, weigh.double(), temperature
    )
    for a, b, x in zip(ours, theirs, exact, strict=True):
        assert (a - x).abs().max() <= 2 * (b - x).abs().max() + 1e-6


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_are_those_of_finite_differences(temperature: float) -> None:
    linear, hidden, targets, _ = problem(70, 70, 2, bias=True)
    weight, bias = linear.weight.detach(), linear.bias.detach()

    def logp(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return head_file._Score.apply(x, w, b, targets, temperature, True)[0]

    inputs = (hidden, weight.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(logp, inputs, fast_mode=True)


@pytest.mark.usefixtures("chunks")
def test_the_entropy_has_no_gradient() -> None:
    linear, hidden, targets, _ = problem(70, 70, 4)
    logp, entropy = ScoringHead(linear)(hidden, targets, 1.0)
    assert logp.requires_grad
    assert not entropy.requires_grad


def test_no_tokens_give_gradients_of_zero() -> None:
    linear, hidden, targets, _ = problem(0, 70, 4, bias=True)
    logp, entropy = ScoringHead(linear)(hidden, targets, 1.0)
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    assert linear.weight.grad is not None
    assert linear.bias.grad is not None
    assert linear.weight.grad.shape == (70, 4)
    assert not linear.weight.grad.any()
    assert not linear.bias.grad.any()
    assert hidden.grad is not None


@pytest.mark.parametrize(
    ("kind", "products"), [("no gradient", 1), ("frozen", 2), ("one chunk", 3), ("many chunks", 4)]
)
def test_no_matrix_product_is_computed_for_nothing(
    kind: str, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, hidden, targets, weigh = problem(150, 100, 4)
    if kind != "one chunk":
        monkeypatch.setattr(head_file, "BUFFER", 1)
    linear.weight.requires_grad_(kind != "frozen")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(kind != "no gradient"):
        logp, entropy = ScoringHead(linear)(hidden, targets, 1.7)
        if kind != "no gradient":
            (weigh * logp).sum().backward()
    assert counter.get_total_flops() == products * 2 * 150 * 100 * 4
    assert logp.requires_grad == (kind != "no gradient")
    for ours, theirs in zip((logp, entropy), full(linear, hidden, targets, 1.7), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen: str) -> None:
    linear, hidden, targets, weigh = problem(150, 100, 4)
    (linear.weight if frozen == "weight" else hidden).requires_grad_(False)
    assert_equal_to_full(linear, hidden, targets, weigh, 1.7)


@pytest.mark.usefixtures("chunks")
def test_gradients_of_a_tied_embedding_add_up() -> None:
    linear, _, targets, weigh = problem(150, 100, 4)
    tokens = torch.randint(100, (150,))

    def gradient(score: Any) -> torch.Tensor:
        hidden = nn.functional.embedding(tokens, linear.weight).tanh()
        loss = (weigh * score(hidden, targets, 1.7)[0]).sum()
        return torch.autograd.grad(loss, linear.weight)[0]

    ours = gradient(ScoringHead(linear))
    torch.testing.assert_close(ours, gradient(lambda *x: full(linear, *x)))


@pytest.mark.usefixtures("chunks")
def test_a_second_backward_pass_gives_the_same() -> None:
    linear, hidden, targets, weigh = problem(150, 100, 4)
    loss = (weigh * ScoringHead(linear)(hidden, targets, 1.7)[0]).sum()
    first, second = (
        torch.autograd.grad(loss, [hidden, linear.weight], retain_graph=keep)
        for keep in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("reentrant", [True, False])
def test_it_may_be_checkpointed(reentrant: bool) -> None:
    linear, hidden, targets, weigh = problem(150, 100, 4)
    scoring = ScoringHead(linear)

    def score(*inputs: Any) -> Any:
        return checkpoint(scoring, *inputs, use_reentrant=reentrant)

    def gradients(score: Any) -> list[torch.Tensor]:
        linear.weight.grad = hidden.grad = None
        (weigh * score(hidden, targets, 1.7)[0]).sum().backward()
        return [hidden.grad, linear.weight.grad]

    for a, b in zip(gradients(score), gradients(scoring), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("chunks")
def test_bfloat16_weights_cost_no_accuracy_where_the_policy_is_sure() -> None:
    """Against float64 from the same rounded logits. Targets have probability 0.99 or so: rounding
    it to bfloat16 before subtracting it from 1 would leave nothing of such tokens' gradients."""
    linear, hidden, targets, weigh = problem(150, 300, 64, torch.bfloat16)
    with torch.no_grad():
        linear.weight.mul_(0.2)
        hidden.copy_(
            7.5 * linear.weight[targets] / linear.weight[targets].norm(dim=1, keepdim=True)
        )
    logp, entropy, to_hidden, to_weight = results(
        ScoringHead(linear), linear, hidden, targets, weigh, 1.0
    )
    logits = linear(hidden).double().detach().requires_grad_()
    exact = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (weigh * exact).sum().backward()
    assert 0.97 < exact.exp().median() < 0.999
    assert logp.dtype == entropy.dtype == torch.float32
    assert to_hidden.dtype == to_weight.dtype == torch.bfloat16
    torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=1e-6)
    for ours, theirs in (
        (to_hidden, logits.grad @ linear.weight.double()),
        (to_weight, logits.grad.T @ hidden.double()),
    ):
        error = (ours.double() - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        assert error.median() < 0.005


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("entry", [1e4, 1e30, torch.inf, -torch.inf, torch.nan])
def test_huge_and_infinite_logits_are_treated_as_torch_treats_them(entry: float) -> None:
    linear, hidden, targets, weigh = problem(150, 100, 1, torch.float32)
    with torch.no_grad():
        linear.weight.fill_(1)[:50] = -1
        linear.weight[7] = 0.5
        hidden[5:9] = entry
    targets[5:9] = torch.tensor([7, 3, 99, 98])
    ours = ScoringHead(linear)(hidden, targets, 1.7)
    theirs = full(linear, hidden, targets, 1.7)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    hidden = hidden.detach().clamp(-1e4, 1e4).nan_to_num().requires_grad_()
    assert_equal_to_full(linear, hidden, targets, weigh, 1.7, rtol=1e-5, atol=1e-5)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it took at any one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = WeakIdKeyDictionary()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.live[tensor] = True
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.live}
        self.bytes = max(self.bytes, sum(s.nbytes() for s in storages.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory_is_a_few_buffers_whatever_the_number_of_tokens(
    dtype: torch.dtype, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_file, "BUFFER", 2**20)
    linear, hidden, targets, weigh = problem(4096, 2048, 4, dtype)
    linear.weight.requires_grad_(not frozen)
    with Peak() as peak:
        logp, _ = ScoringHead(linear)(hidden, targets, 1.7)
        (weigh * logp).sum().backward()
    # two buffers, a third of half their size for bfloat16, and tensors [N, H], [V, H] and [N]
    assert 2 * 2**20 < peak.bytes < 3 * 2**20 < 4096 * 2048 * 4 / 8


def test_the_parameters_are_the_head_s_own() -> None:
    linear = nn.Linear(4, 9)
    scoring = ScoringHead(linear)
    assert scoring.weight is linear.weight
    assert scoring.bias is linear.bias
    assert len(list(scoring.parameters())) == 2


def test_scores_are_those_of_the_model_s_own_logits(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        hidden = model.base_model(tokens)[0][0, :-1]
        logp, _ = scoring_head(model)(hidden, tokens[0, 1:], 1.0)
    torch.testing.assert_close(logp, expected)


@pytest.mark.parametrize(
    ("family", "options", "attribute"),
    [
        ("Gemma2", {}, "final_logit_softcapping is 30.0"),
        ("Cohere", {}, "logit_scale is 0.0625"),
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling is 8.0"),
    ],
)
def test_models_that_change_their_logits_are_refused(
    family: str, options: dict[str, Any], attribute: str
) -> None:
    import transformers

    sizes = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(**sizes, **options)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    with pytest.raises(RftError, match=attribute):
        scoring_head(model)


def test_a_head_with_an_adapter_is_refused(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(RftError, match="not a plain Linear"):
        scoring_head(adapted.get_base_model())
