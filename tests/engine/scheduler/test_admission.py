"""Who waits for room in the query pool, and that nobody waits for ever."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_am.engine.footprint import ceil_div
from vllm_am.engine.scheduler.query_pool import Use

pytestmark = pytest.mark.engine


def request(tokens, computed=0, use=Use.OWN, found=0):
    return SimpleNamespace(
        num_prompt_tokens=tokens, num_computed_tokens=computed, use=use, max_tokens=0, found=found
    )


class World:
    """A pool of blocks of 16 and a pool of queries; every position is kept."""

    def __init__(self, free_blocks=50, room=1000, jobs=(), reads=False, filed=0):
        from vllm_am.engine.scheduler.admission import Admission

        self.jobs = SimpleNamespace(all=list(jobs))
        self.queries = SimpleNamespace(
            are_read=reads,
            room=lambda use: room,
            needed=lambda request, rate, begun: rate * (request.num_prompt_tokens - begun),
        )
        pool = SimpleNamespace(get_num_free_blocks=lambda: free_blocks)
        self.admission = Admission(
            SimpleNamespace(blocks_to_grow=lambda tokens: ceil_div(tokens, 16)),
            SimpleNamespace(block_pool=pool, cache=SimpleNamespace(filed=filed)),
            SimpleNamespace(
                longest=lambda request: request.num_prompt_tokens + request.max_tokens,
                use_of_queries=lambda request: request.use,
                options=lambda request: SimpleNamespace(sample_rate=1.0),
            ),
            SimpleNamespace(tokens_found=lambda request: request.found),
            self.queries,
            self.jobs,
        )


def test_as_many_begin_as_find_room_for_their_queries():
    """The second and third, 500 tokens each, come when the fits of those before have ended."""
    world = World(free_blocks=50, room=1100)
    waiting = [request(500), request(500), request(500)]
    assert world.admission.most(waiting, [], 8) == 2
    assert world.admission.waits


def test_where_blocks_suffice_for_all_nobody_waits():
    waiting = [request(500), request(500), request(500)]
    world = World(free_blocks=100, room=100, jobs=["one"])
    assert world.admission.most(waiting, [], 8) is None
    assert not world.admission.waits
    # With what running ones are going to need.
    assert (
        World(free_blocks=100, room=100, jobs=["one"]).admission.most(
            waiting, [request(400, computed=300)] * 2, 8
        )
        == 0
    )


def test_blocks_of_compacted_prefixes_are_none_to_be_read_into():
    """Who is read into them today is read again tomorrow, and so is what they stood for."""
    waiting = [request(500)]
    assert World(room=100, jobs=["one"]).admission.most(waiting, [], 8) is None
    assert World(room=100, jobs=["one"], filed=20).admission.most(waiting, [], 8) == 0


def test_who_needs_no_queries_passes():
    """One that will not be compacted, and one that the pool could not hold otherwise."""
    waiting = [request(900, use=Use.PERHAPS), request(5000, use=Use.MUST), request(500)]
    assert World(room=400, jobs=["one"]).admission.most(waiting, [], 8) == 2


def test_who_begins_on_a_compacted_prefix_reads_and_needs_the_rest_only():
    waiting = [request(500, found=480), request(500, found=480), request(500), request(500)]
    assert World(free_blocks=60, room=600, jobs=["one"]).admission.most(waiting, [], 8) == 3
    assert World(free_blocks=66, room=0, jobs=["one"]).admission.most(waiting[:3], [], 8) is None


def test_nobody_waits_where_nothing_would_make_room():
    """After the steps that lie between a prompt's end and its fit."""
    world = World(room=100, reads=True)
    waiting = [request(900)]
    assert world.admission.most(waiting, [], 8) == 0
    world.queries.are_read = False
    assert [world.admission.most(waiting, [], 8) for _ in range(4)] == [0, 0, None, None]
    assert not world.admission.waits
    world.jobs.all.append("a fit")
    assert world.admission.most(waiting, [], 8) == 0


def test_no_more_are_looked_at_than_there_are_places_for():
    """Nor any where nobody waits."""
    waiting = [request(500), request(500), request(500)]
    assert World(room=600).admission.most(waiting, [], 1) is None
    assert World(room=600).admission.most(waiting, [], 2) == 1
    assert World(free_blocks=0, room=0, jobs=["one"]).admission.most([], [], 8) is None


def test_the_limit_holds_for_a_step_and_not_beside_passes():
    world = World(room=600)
    scheduler = SimpleNamespace(
        max_num_active_reqs=8,
        num_waiting_for_streaming_input=1,
        running=[request(100, computed=100)],
        waiting=[request(500), request(500)],
        studies={},
    )
    with world.admission.limited(scheduler):
        assert scheduler.max_num_active_reqs == 3
    assert scheduler.max_num_active_reqs == 8
    assert world.admission.waits
    scheduler.studies = {"somebody": None}
    with world.admission.limited(scheduler):
        assert scheduler.max_num_active_reqs == 8
    assert not world.admission.waits
    scheduler.studies = {}
    with pytest.raises(RuntimeError), world.admission.limited(scheduler):
        raise RuntimeError
    assert scheduler.max_num_active_reqs == 8
