import pickle

import pytest

from sparsify import errors
from sparsify.errors import SparsifyError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SparsifyError)]


def test_all_kinds_of_errors_are_found():
    assert len(KINDS) >= 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_says_what_got_allowed_and_fix(kind):
    error = kind("That is wrong", got=3, allowed="1 or 2", fix="value=1")
    assert str(error) == error.paragraph() == "That is wrong. Got: 3. Allowed: 1 or 2. Fix: value=1."
    assert str(kind("That is wrong.")) == "That is wrong."


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_trip_between_processes(kind):
    error = kind("That is wrong", got={"a": [1]}, allowed=(1, 2), fix="value=1")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) == str(error)


def test_falsy_values_are_shown():
    assert "Got: 0." in str(SparsifyError("No", got=0))


@pytest.mark.parametrize("kind", KINDS)
def test_mistakes_of_the_user_exit_with_two_and_failures_with_one(kind):
    assert kind.exit_code == (2 if issubclass(kind, ValueError) else 1)
