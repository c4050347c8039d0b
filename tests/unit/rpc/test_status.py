"""What a failed call tells."""

from __future__ import annotations

from parleyd.errors import InvalidRequest, Violation
from parleyd.rpc import status


def test_half_of_a_surrogate_pair_is_told_as_a_question_mark() -> None:
    error = InvalidRequest([Violation("messages", "the model's chat template refuses them: bad type \ud800")])
    assert status.to_status(error, "id").message.endswith("bad type ?")
