"""ULIDs and tokens."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beaker_sessions import ids


def test_ulids_grow_even_when_the_clock_jumps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [ids.ulid() for _ in range(1000)]
    monkeypatch.setattr(ids.time, "time_ns", lambda: 86_400_000_000_000)
    made += [ids.ulid() for _ in range(1000)]
    assert made == sorted(set(made))
    assert all(ids.is_ulid(id) for id in made)


def test_ulids_of_several_threads_differ() -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.extend(ids.ulid() for _ in range(500))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 2000


def test_tokens() -> None:
    made = {ids.mint_token() for _ in range(200)}
    assert len(made) == 200
    for token in made:
        assert token.startswith("bkr_")
        assert len(token) == 53
        assert ids.looks_like_token(token)
        assert len(ids.hash_token(token)) == 64


def test_a_token_for_a_key_depends_on_both() -> None:
    one = ids.mint_token("secret", "key")
    assert one == ids.mint_token("secret", "key")
    assert len({one, ids.mint_token("secret", "other"), ids.mint_token("other", "key")}) == 3
    assert ids.looks_like_token(one)


@settings(deadline=None)
@given(st.integers(4, 52), st.sampled_from(ids.BASE62))
def test_one_wrong_character_is_noticed(place: int, char: str) -> None:
    token = ids.mint_token()
    wrong = token[:place] + char + token[place + 1 :]
    assert ids.looks_like_token(wrong) == (wrong == token)


@settings(deadline=None)
@given(st.text())
def test_other_text_is_no_token(text: str) -> None:
    assert not ids.looks_like_token(text)
    assert not ids.looks_like_token("bkr_" + text)
