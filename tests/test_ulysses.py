"""Ranks that share rows get what one rank gets that computes each sequence alone.

Every rank is a process of its own, and stays for the whole module since starting one takes long.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist

from rft.errors import RftError
from rft.learner.ulysses import Ulysses

VOCABULARY = 48
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Spec:
    """A model and rows for it. A row is blocks, a block `(prompt, responses)` in tokens."""

    rows: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    family: str = "Qwen2"
    heads: int = 4
    kv_heads: int = 2
    attention: str = "sdpa"
    checkpointing: bool = False
    window: int | None = None


PADDED = Spec((((6, (14,)),), ((3, (8,)),), ((9, (9,)),)))
PACKED = Spec((((3, (5,)), (4, (9,))), ((10, (6,)), (2, (2,)), (1, (1,)))))
SHARED = Spec((((6, (4, 5, 1)), (2, (3, 3))), ((4, (3, 7)),)))


# ---- in each rank's process


def _join(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)


def _model(spec: Spec) -> Any:
    import transformers

    config = getattr(transformers, f"{spec.family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.1,
        attn_implementation=spec.attention,
        **({} if spec.window is None else windowed(spec)),
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{spec.family}ForCausalLM")(config)
    if spec.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def windowed(spec: Spec) -> dict[str, Any]:
    if spec.family == "Qwen2":  # the second layer alone has the window
        return {"use_sliding_window": True, "sliding_window": spec.window, "max_window_layers": 1}
    return {"sliding_window": spec.window}


def _score(
    model: Any, hidden_nH: torch.Tensor, targets_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logp_nV = torch.log_softmax(model.get_output_embeddings()(hidden_nH), -1)
    entropy_n = -(logp_nV.exp() * logp_nV).sum(-1)
    return logp_nV.gather(-1, targets_n[:, None])[:, 0], entropy_n


def _loss(logp_N: torch.Tensor, entropy_N: torch.Tensor) -> torch.Tensor:
    """Not linear, so that a gradient that is counted twice or computed from others' shows."""
    weight_N = torch.linspace(-1, 2, len(logp_N))
    return (weight_N * logp_N.exp()).sum() + 0.1 * logp_N.mean() ** 2 + (weight_N * entropy_N).sum()


def _finish(model: Any, logp_N: torch.Tensor, entropy_N: torch.Tensor) -> tuple[Floats, ...]:
    _loss(logp_N, entropy_N).backward()
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in grads if g is not None])
    assert all(g is not None for g in grads)
    return logp_N.detach().numpy(), entropy_N.detach().numpy(), flat.numpy()


def _alone(spec: Spec, chosen: slice) -> tuple[Floats, ...]:
    """Each sequence in a row of its own, without padding or mask, on one rank."""
    model = _model(replace(spec, checkpointing=False))
    parts = []
    for prompt_T, responses in sequences(spec):
        for response_T in responses:
            tokens_1T = torch.cat((prompt_T, response_T))[None]
            hidden_TH = model.base_model(input_ids=tokens_1T)[0][0]
            hidden_nH = hidden_TH[len(prompt_T) - 1 : -1]
            parts.append(_score(model, hidden_nH, response_T))
    logp_N, entropy_N = (torch.cat(p)[chosen] for p in zip(*parts, strict=True))
    return _finish(model, logp_N, entropy_N)


def _shared(spec: Spec, chosen: slice) -> tuple[Any, ...]:
    """The rows on all ranks together; also says how many tokens this rank scored."""
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed("gloo", verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    ulysses = Ulysses(rank, world, world)
    model = _model(spec)
    ulysses.attach(model)
    tokens_BW, positions_BW, mask_B1WW, before_N, targets_N = layout(spec)
    before_N, targets_N = before_N[chosen], targets_N[chosen]
    inputs = ulysses.inputs(tokens_BW, positions_BW, mask_B1WW)
    hidden_BLH = model.base_model(**inputs, use_cache=False)[0]
    own = ulysses.own(before_N, tokens_BW.shape[1])
    hidden_nH = hidden_BLH.flatten(0, 1)[own.before_n]
    values_n2 = torch.stack(_score(model, hidden_nH, targets_N[own.tokens_n]), -1)
    logp_N, entropy_N = ulysses.gather(values_n2, own).unbind(-1)
    return *_finish(model, logp_N, entropy_N), len(own.tokens_n), inputs["input_ids"].shape[1]


def _mask_of(spec: Spec) -> Any:
    ulysses = Ulysses(dist.get_rank(), dist.get_world_size(), dist.get_world_size())
    ulysses.attach(_model(spec))
    return ulysses.inputs(*layout(spec)[:3])["attention_mask"]


def _attach(spec: Spec, **config: Any) -> None:
    model = _model(spec)
    for name, value in config.items():
        setattr(model.config, name, value)
    Ulysses(dist.get_rank(), dist.get_world_size(), dist.get_world_size()).attach(model)


def _gather_in_groups(parallel: int) -> tuple[int, int, int, int, list[float], list[float]]:
    """Of a row of 6 columns, all but the first chosen; a value is its column and its replica."""
    ulysses = Ulysses(dist.get_rank(), dist.get_world_size(), parallel)
    own = ulysses.own(torch.tensor([4, 0, 3, 1, 2]), 6)
    values_n = (own.before_n + 3 * ulysses.position + 10.0 * ulysses.replica).requires_grad_()
    values_N = ulysses.gather(values_n, own)
    (values_N * torch.arange(1.0, 6.0)).sum().backward()
    assert values_n.grad is not None
    return (
        ulysses.position,
        ulysses.size,
        ulysses.replica,
        ulysses.replicas,
        values_N.tolist(),
        values_n.grad.tolist(),
    )


def _make(rank: int, world: int, parallel: int) -> None:
    Ulysses(rank, world, parallel)


# ---- rows


def sequences(spec: Spec) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """The tokens of each block: its prompt, and its responses."""
    random = torch.Generator().manual_seed(5)

    def draw(n: int) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (n,), generator=random)

    return [(draw(p), [draw(n) for n in responses]) for row in spec.rows for p, responses in row]


def longer(spec: Spec) -> Spec:
    """The same with one token more in each row."""
    rows = [((row[0][0] + 1, row[0][1]), *row[1:]) for row in spec.rows]
    return replace(spec, rows=tuple(rows))


def layout(spec: Spec) -> tuple[Any, ...]:
    """`(tokens_BW, positions_BW, mask_B1WW, before_N, targets_N)` of the rows, as a learner that
    is not parallel would have them."""
    width = max(sum(p + sum(responses) for p, responses in row) for row in spec.rows)
    tokens_BW = torch.zeros(len(spec.rows), width, dtype=torch.int64)
    positions_BW = torch.arange(width).repeat(len(spec.rows), 1)
    mask_B1WW = torch.eye(width, dtype=torch.bool).repeat(len(spec.rows), 1, 1, 1)
    before: list[int] = []
    targets: list[torch.Tensor] = []
    blocks = iter(sequences(spec))
    for b, row in enumerate(spec.rows):
        column = 0
        for _ in row:
            prompt_T, responses = next(blocks)
            start, p = column, len(prompt_T)
            for k, part_T in enumerate((prompt_T, *responses)):
                end = column + len(part_T)
                tokens_BW[b, column:end] = part_T
                first = 0 if k == 0 else p
                positions_BW[b, column:end] = torch.arange(first, first + len(part_T))
                mask_B1WW[b, 0, column:end, column:end] = torch.ones(
                    len(part_T), len(part_T)
                ).tril()
                if k:
                    mask_B1WW[b, 0, column:end, start : start + p] = True
                    where = [start + p - 1, *range(column, end - 1)]
                    before += [b * width + w for w in where]
                    targets.append(part_T)
                column = end
        positions_BW[b, column:] = torch.arange(width - column)  # padding
    shared = any(len(responses) > 1 for row in spec.rows for _, responses in row)
    packed = any(len(row) > 1 for row in spec.rows)
    return (
        tokens_BW,
        positions_BW if packed or shared else None,
        mask_B1WW if shared else None,
        torch.tensor(before),
        torch.cat(targets),
    )


# ---- processes


class Ranks:
    """Processes that have joined in one gloo group."""

    def __init__(self, world: int, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, mp_context=context) for _ in range(world)]
        self._wait([p.submit(_join, r, world, str(store)) for r, p in enumerate(self._pools)])

    def run(self, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        return self._wait([pool.submit(job, *args, **kwargs) for pool in self._pools])

    def first(self, job: Callable[..., Any], *args: Any) -> Any:
        return self._wait([self._pools[0].submit(job, *args)])[0]

    def close(self) -> None:
        for pool in self._pools:
            for process in (pool._processes or {}).values():
                process.kill()
            pool.shutdown()

    def _wait(self, pending: list[Future[Any]]) -> list[Any]:
        return [future.result(120) for future in pending]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("pair") / "store")
    yield ranks
    ranks.close()


def assert_close(found: Floats, expected: Floats, within: float = 1e-6) -> None:
    """To `within` of the greatest, which is what float32 leaves of another order of summing."""
    limit = within * float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


def assert_alike(pair: Ranks, spec: Spec, chosen: slice = slice(None)) -> list[int]:
    """Two ranks give what one gives; returns how many tokens each of them scored."""
    expected = pair.first(_alone, spec, chosen)
    found = pair.run(_shared, spec, chosen)
    for logp_N, entropy_N, *_ in found:
        assert_close(logp_N, expected[0])
        assert_close(entropy_N, expected[1])
    np.testing.assert_array_equal(found[0][0], found[1][0])  # or their losses would differ
    assert_close(found[0][2] + found[1][2], expected[2], within=3e-6)
    width = layout(spec)[0].shape[1]
    assert {f[4] for f in found} == {-(-width // 2)}
    return [f[3] for f in found]


# ---- one gradient


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("rows", [PADDED, PACKED, SHARED], ids=["padded", "packed", "shared"])
def test_two_ranks_that_share_rows_get_what_one_gets(
    pair: Ranks, rows: Spec, checkpointing: bool
) -> None:
    scored = assert_alike(pair, replace(rows, checkpointing=checkpointing))
    assert min(scored) > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [PADDED, PACKED, SHARED], ids=["padded", "packed", "shared"])
def test_a_width_that_is_no_multiple_of_the_ranks_is_padded(
    pair: Ranks, rows: Spec, attention: str
) -> None:
    odd = replace(longer(rows), attention=attention)
    assert layout(odd)[0].shape[1] % 2 == 1
    assert_alike(pair, odd)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 3), (2, 2)])
@pytest.mark.parametrize("rows", [PADDED, SHARED], ids=["padded", "shared"])
def test_key_heads_need_not_divide_by_the_ranks(
    pair: Ranks, rows: Spec, heads: int, kv_heads: int
) -> None:
    assert_alike(pair, replace(rows, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3", "Gemma2"])
@pytest.mark.parametrize("rows", [PADDED, PACKED], ids=["padded", "packed"])
def test_other_models_do_as_well(pair: Ranks, rows: Spec, family: str) -> None:
    window = {"Mistral": 5, "Gemma2": 5}.get(family)
    attention = "eager" if family == "Gemma2" else "sdpa"  # it caps the scores
    spec = replace(rows, family=family, window=window, attention=attention)
    assert_alike(pair, spec)


@pytest.mark.parametrize("rows", [PADDED, PACKED], ids=["padded", "packed"])
def test_a_sliding_window_goes_across_ranks(pair: Ranks, rows: Spec) -> None:
    assert_alike(pair, replace(rows, window=5))


@pytest.mark.parametrize("rows", [PADDED, PACKED, SHARED], ids=["padded", "packed", "shared"])
def test_eager_attention_is_shared_too(pair: Ranks, rows: Spec) -> None:
    assert_alike(pair, replace(rows, attention="eager"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("chosen", "idle"), [(slice(0, 4), 1), (slice(7, 14), 0)])
def test_a_rank_may_have_none_of_the_chosen_tokens(
    pair: Ranks, chosen: slice, idle: int, checkpointing: bool
) -> None:
    scored = assert_alike(pair, replace(PADDED, checkpointing=checkpointing), chosen)
    assert scored[idle] == 0
    assert scored[1 - idle] == chosen.stop - chosen.start


def test_rows_without_restarts_need_no_mask(pair: Ranks) -> None:
    for rows in (PADDED, longer(PADDED)):
        assert pair.run(_mask_of, rows) == [{"full_attention": None}] * 2
        assert pair.run(_mask_of, replace(rows, family="Llama")) == [None] * 2


def test_columns_of_padding_attend_to_something(pair: Ranks) -> None:
    for mask in pair.run(_mask_of, replace(longer(SHARED), family="Llama")):
        assert mask.shape == (2, 1, 26, 26)
        assert mask.any(-1).all()


# ---- groups


@pytest.mark.parametrize("parallel", [1, 2])
def test_ranks_gather_within_their_group(pair: Ranks, parallel: int) -> None:
    found = pair.run(_gather_in_groups, parallel)
    for rank, (position, size, replica, replicas, values, grads) in enumerate(found):
        assert (position, size) == (rank % parallel, parallel)
        assert (replica, replicas) == (rank // parallel, 2 // parallel)
        if parallel == 1:
            assert values == [column + 10.0 * rank for column in (4, 0, 3, 1, 2)]
            assert grads == [1, 2, 3, 4, 5]
        else:
            assert values == [4, 0, 3, 1, 2]
            assert grads == ([2, 4, 5], [1, 3])[rank]


def test_four_ranks_are_two_groups_of_neighbours(tmp_path: Path) -> None:
    ranks = Ranks(4, tmp_path / "store")
    found = ranks.run(_gather_in_groups, 2)
    ranks.close()
    assert [f[:4] for f in found] == [(0, 2, 0, 2), (1, 2, 0, 2), (0, 2, 1, 2), (1, 2, 1, 2)]
    assert [f[4] for f in found] == [[4, 0, 3, 1, 2]] * 2 + [[14, 10, 13, 11, 12]] * 2
    assert [f[5] for f in found] == [[2, 4, 5], [1, 3]] * 2


# ---- what cannot be shared


def test_query_heads_must_divide_by_the_ranks(pair: Ranks) -> None:
    with pytest.raises(RftError, match=r"sequence_parallel=2.*num_attention_heads=3"):
        pair.run(_attach, replace(PADDED, heads=3, kv_heads=3))


def test_ranks_must_divide_into_groups() -> None:
    with pytest.raises(RftError, match=r"sequence_parallel=3.*4 learner ranks"):
        _make(0, 4, 3)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "'dynamic'"),
    ],
)
def test_models_that_need_whole_rows_elsewhere_are_refused(
    pair: Ranks, config: dict[str, Any], told: str
) -> None:
    with pytest.raises(RftError, match=told):
        pair.run(_attach, PADDED, **config)
