"""The vLLM layer: one room for each of the processes in which vLLM runs compaction.

=============  =====================================================================================
``frontend/``  API servers, and whatever configures an engine: flags, refusals, request options,
               metrics
``scheduler/`` the engine core: what is compacted when, from which queries; who owns which block
``worker/``    one per rank, where the tensors are: fit, write pages, attend
=============  =====================================================================================

The rooms never import each other. What two of them need stands here, between them: ``messages.py``
(scheduler and workers), ``stats.py`` (scheduler to front end), ``limits.py`` and ``footprint.py``
(numbers that all must agree on), ``spec.py`` (the cache spec: made by workers, read by the engine
core), ``capabilities.py`` (what is refused). Two files know the rooms: ``plugin.py``, which vLLM
calls in every process, and ``classes.py``, which tells vLLM the names of our classes.
``tests/engine/test_rooms.py`` holds all of this.

Every vLLM symbol that is touched, how, where and why: ``contacts.py``.
"""
