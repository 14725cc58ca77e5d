from drawplate.rl.length import Length
from tests.laws import law
from tests.rl_cases import fields, neighbours, oracle


@law(Length)
def test_oracle(method):
    for steps in (1, 2, 7, 100):
        for step in range(steps):
            assert method.limit(step, steps) == oracle(method)(step, steps, **fields(method))


@law(Length)
def test_a_whole_number_of_at_least_one(method):
    assert all(isinstance(method.limit(i, 9), int) and method.limit(i, 9) >= 1 for i in range(9))


@law(Length)
def test_every_field_matters(method):
    for name, others in neighbours(method):
        assert any(m.limit(s, 5) != method.limit(s, 5) for m in others for s in (0, 4)), name
