"""The front end: API server processes, and any process that configures an engine.

Flags, validation, what is refused and said at startup, request options, metrics. Nothing here runs
in a step of the engine; nothing here may be imported by scheduler or worker.
"""
