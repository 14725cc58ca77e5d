"""Laws of every sample of calibration rows: its distribution, against enumeration."""

import itertools
from math import sqrt

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from drawplate.core.calibration import Calibration, TextCorpus
from drawplate.core.errors import UserError
from drawplate.core.method import leaves
from drawplate.core.pooled import diverse, frame, leverages
from drawplate.core.sample import Sample
from drawplate.core.seeds import generator
from drawplate.data.tokenizer import END, PAD, SMALLEST, train
from tests.compress_layers import oracle
from tests.laws import law


def features(rows=5, columns=2, seed=0):
    """Candidates of unequal importance, [rows, columns]."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    return x * (0.3 + torch.rand(rows, 1, generator=draw, dtype=torch.float64) * 2)


def counted(method, x, count, draws, seed=0):
    """How often every sorted tuple of rows was picked."""
    draw, seen = torch.Generator().manual_seed(seed), {}
    for _ in range(draws):
        rows = tuple(sorted(method.pick(x, count, draw).rows.tolist()))
        seen[rows] = seen.get(rows, 0) + 1
    return seen


@law(Sample)
@pytest.mark.parametrize(("count", "columns"), [(1, 2), (2, 2), (3, 2), (4, 3)])
def test_distribution_is_that_of_the_oracle(method, count, columns):
    """Chi-square far beyond any quantile that a right sampler would be seen at."""
    x, draws = features(columns=columns), 1000
    wanted = oracle(f"core/sample/{method.name}")(x.numpy(), count)
    assert sum(wanted.values()) == pytest.approx(1)
    seen = counted(method, x, count, draws)
    assert set(seen) <= {rows for rows, chance in wanted.items() if chance > 1e-15}
    cells = [(draws * chance, seen.get(rows, 0)) for rows, chance in wanted.items()]
    large = [cell for cell in cells if cell[0] >= 5]
    rest = [sum(part) for part in zip(*(c for c in cells if c[0] < 5), strict=True)]
    if rest and rest[0] >= 5:
        large.append(tuple(rest))
    chi = sum((found - expected) ** 2 / expected for expected, found in large)
    freedom = max(len(large) - 1, 1)
    assert chi < freedom + 5 * sqrt(2 * freedom)


def weights_of(method, x, count):
    """What every candidate counts when it is picked, as far as it was seen."""
    draw, found = torch.Generator().manual_seed(9), {}
    for _ in range(400):
        picked = method.pick(x, count, draw)
        for row, weight in zip(picked.rows.tolist(), picked.weights.tolist(), strict=True):
            assert found.setdefault(row, weight) == pytest.approx(weight)
    return found


@law(Sample)
@pytest.mark.parametrize("count", [2, 3])
def test_weighted_sums_are_unbiased(method, count):
    """Exactly: the mean over the oracle's distribution with the leaf's weights."""
    x = features()
    weights = weights_of(method, x, count)
    values = torch.linspace(-1, 2, len(x), dtype=torch.float64).square() + 1
    mean = 0.0
    for rows, chance in oracle(f"core/sample/{method.name}")(x.numpy(), count).items():
        mean += chance * sum(weights[row] * float(values[row]) for row in rows)
    assert mean == pytest.approx(float(values.mean()), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_least_squares_on_a_volume_sample_is_unbiased(count):
    """E of the weighted fit on picked rows = the fit on all candidates, by enumeration."""
    x = features(6)
    y = torch.linspace(-1, 1, 6, dtype=torch.float64).exp() * torch.tensor([1, -1, 2, 1, -2, 1.0])
    weights = weights_of(leaves(Sample)["volume"](), x, count)
    fit = np.zeros(2)
    for rows, chance in oracle("core/sample/volume")(x.numpy(), count).items():
        if chance > 1e-14:
            root = np.sqrt([weights[row] for row in rows])
            some = list(rows)
            part = np.linalg.lstsq(x.numpy()[some] * root[:, None], y.numpy()[some] * root)[0]
            fit += chance * part
    whole = np.linalg.lstsq(x.numpy(), y.numpy())[0]
    np.testing.assert_allclose(fit, whole, rtol=1e-9)


def test_one_diverse_set_costs_its_size_plus_one_times_the_least_error():
    """Derezinski and Warmuth 2017: E |X w_S - y|^2 = (r + 1) min |X w - y|^2, |S| = r."""
    x = features(7, 3)
    y = torch.linspace(-1, 1, 7, dtype=torch.float64).cos() * 3
    exact = np.linalg.lstsq(x.numpy(), y.numpy())[0]
    least = float(np.square(x.numpy() @ exact - y.numpy()).sum())
    error = 0.0
    for rows, chance in oracle("core/sample/dpp")(x.numpy(), 3).items():
        some = list(rows)
        fit = np.linalg.solve(x.numpy()[some], y.numpy()[some])
        error += chance * float(np.square(x.numpy() @ fit - y.numpy()).sum())
    assert error == pytest.approx(4 * least, rel=1e-9)


def test_a_row_is_in_a_diverse_set_as_often_as_its_leverage_says():
    basis = frame(features(8, 3))
    draw, seen = torch.Generator().manual_seed(0), torch.zeros(8, dtype=torch.float64)
    for _ in range(2000):
        rows = diverse(basis, draw)
        assert len(rows.unique()) == 3
        seen[rows] += 1
    assert (seen / 2000 - leverages(basis)).abs().max() < 0.05
    assert float(leverages(basis).sum()) == pytest.approx(3)


def test_equal_rows_are_never_picked_together():
    x = features(4, 2)
    x = torch.cat([x, x[:1], x[:1] * -3])
    for _, rows in zip(range(200), iter(lambda: diverse(frame(x), DRAW), None), strict=False):
        assert len({0, 4, 5} & set(rows.tolist())) <= 1


DRAW = torch.Generator().manual_seed(1)


@law(Sample)
def test_a_linear_map_of_the_features_changes_nothing(method):
    """Leverage knows the span alone; only a remainder of a diverse set looks at energies."""
    x = features(9, 3)
    turned = x @ torch.tensor([[2.0, 1, 0], [0, 1, 1], [1, 0, 3]], dtype=torch.float64)
    for seed in range(5):
        one = method.pick(x, 6, torch.Generator().manual_seed(seed))
        other = method.pick(turned, 6, torch.Generator().manual_seed(seed))
        assert torch.equal(one.rows, other.rows)
        torch.testing.assert_close(one.weights, other.weights)


@law(Sample)
def test_features_that_depend_on_one_another(method):
    x = features(6, 2)
    x = torch.cat([x, x[:, :1] - x[:, 1:]], 1)
    picked = method.pick(x, 5, torch.Generator().manual_seed(0))
    assert len(picked.rows) == len(picked.weights) == 5
    assert picked.weights.isfinite().all()
    assert picked.rows.min() >= 0
    assert picked.rows.max() < 6


@law(Sample)
def test_pure(method):
    x = features(9, 3)
    before = x.clone()
    one, other = (method.pick(x, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(x, before)
    assert one.rows.dtype == torch.int64
    if method.width():
        with pytest.raises(UserError, match="features are all zero"):
            method.pick(0 * x, 4, torch.Generator())


class Words:
    """A tokenizer of one token for each character."""

    eos_token_id, pad_token_id = 0, 0

    def __len__(self):
        return 128

    def __call__(self, text, **_):
        return {"input_ids": [ord(character) % 128 for character in text]}


@pytest.fixture
def corpus(tmp_path):
    draw = generator("text")
    text = [chr(97 + int(i)) for i in torch.randint(4, (3000,), generator=draw)]
    text[1500:1520] = "zyxwvutsrqzyxwvutsrq"
    (tmp_path / "text.txt").write_text("".join(text))
    return TextCorpus(tmp_path / "text.txt", Words())


def test_spelled_special_tokens_of_a_text_stay_text(tmp_path):
    """Also with a tokenizer that would look for them in what it is given."""
    train(["ab"], SMALLEST).save_pretrained(tmp_path)
    careless = PreTrainedTokenizerFast.from_pretrained(tmp_path, split_special_tokens=False)
    text = f"a{END}b{PAD}{END}"
    assert careless.eos_token_id in careless(text)["input_ids"]
    (tmp_path / "text.txt").write_text(text)
    *tokens, last = TextCorpus(tmp_path / "text.txt", careless).stream("text-train").tokens.tolist()
    assert last == careless.eos_token_id
    assert not {careless.eos_token_id, careless.pad_token_id} & set(tokens)
    assert careless.decode(tokens) == text


def test_uniform_rows_are_those_that_were_always_taken(corpus):
    tokens = corpus.stream("text-train").tokens
    begins = torch.randint(
        len(tokens) - 7, (6,), generator=generator(5, "calibration", "text-train")
    )
    wanted = torch.stack([torch.from_numpy(tokens[b : b + 8].astype(np.int64)) for b in begins])
    assert torch.equal(Calibration(rows=6, length=8, seed=5).tokens(corpus), wanted)


@law(Sample)
def test_rows_of_a_corpus(method, corpus):
    made = Calibration.model_validate({"rows": 40, "length": 8, "sample": method.model_dump()})
    rows = made.tokens(corpus)
    assert rows.shape == (40, 8)
    assert torch.equal(rows, made.tokens(corpus))
    assert not torch.equal(rows, made.model_copy(update={"seed": 1}).tokens(corpus))
    for field, value in (("pool", 3), ("features", 5)):
        if field in type(method).model_fields:
            other = made.model_copy(update={"sample": method.model_copy(update={field: value})})
            assert not torch.equal(rows, other.tokens(corpus)), field


def test_rare_text_is_seen_by_diverse_samples(corpus):
    """Twenty characters of three thousand: a row that holds some of them has a high leverage."""

    def rare(name):
        made = [
            Calibration.model_validate(
                {"rows": 32, "length": 8, "seed": seed, "sample": {"name": name}}
            )
            for seed in range(5)
        ]
        return sum(int((one.tokens(corpus) > 106).any(1).sum()) for one in made)

    least = rare("uniform")
    assert all(rare(name) > 2 * least + 5 for name in ("leverage", "dpp", "volume"))


def test_every_pair_of_samples_differs(corpus):
    found = [
        Calibration.model_validate({"rows": 40, "length": 8, "sample": {"name": name}}).tokens(
            corpus
        )
        for name in leaves(Sample)
    ]
    for one, other in itertools.combinations(found, 2):
        assert not torch.equal(one, other)
